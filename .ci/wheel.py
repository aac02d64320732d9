"""What a user does first with the installed package, from an empty folder; run by `.ci/run`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from safetensors.torch import save_file

import art_clat
from art_clat.models.datasets import load_digits


def run(*command):
    """Run a program of this environment, and return what it prints."""
    program, *arguments = map(str, command)
    print("$", program, *arguments, flush=True)
    done = subprocess.run([Path(sys.prefix) / "bin" / program, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}")
    return done.stdout


def train():
    """Train a small network on digits: one epoch of PGD-AT, one of CLAT."""
    settings = {"num_classes": 10, "input_size": (1, 8, 8)}
    torch.manual_seed(0)
    model = art_clat.create_backbone("resnet18", **settings)
    classifier = PyTorchClassifier(
        model, torch.nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0), device_type="cpu",
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
    )  # fmt: skip
    attack = ProjectedGradientDescent(classifier, eps=0.1, eps_step=0.05, max_iter=2, verbose=False)
    trainer = art_clat.AdversarialTrainerCLATPyTorch(classifier, attack, warmup=1, seed=0)
    x, y = load_digits()
    trainer.fit(x[:200], y[:200], validation_data=(x[200:250], y[200:250]), nb_epochs=2, verbose=False)
    assert [record.stage for record in trainer.history.epochs] == ["adversarial training", "clat"]
    assert trainer.history.selections[0].chosen
    Path("training").mkdir()
    trainer.history.to_json("training/first-run.json")
    save_file(model.state_dict(), "weights.safetensors")


def main():
    """Train, evaluate and report, with nothing of the checkout in reach."""
    assert Path(art_clat.__file__).is_relative_to(sys.prefix), art_clat.__file__
    assert not list(Path.cwd().iterdir())
    assert (
        run("art-clat", "--version")
        == run("python", "-m", "art_clat", "--version")
        == (f"art_clat {art_clat.__version__}\n")
    )
    train()
    of_resnet = ["--model", "resnet18", "--checkpoint", "weights.safetensors", "--eps", "8/255"]
    few = ["--n-examples", "20", "--version", "none", "--pgd-steps", "2"]
    run("art-clat", "evaluate", *of_resnet, *few, "--dataset", "digits", "--output", "evaluation")
    x, y = load_digits()
    np.savez("own.npz", x=x[:20], y=y[:20])
    run("python", "-m", "art_clat", "evaluate", *of_resnet, *few, "--dataset", "own.npz", "--num-classes", "10",
        "--output", "own")  # fmt: skip
    run("art-clat", "report", "evaluation", "training", "own")
    page = Path("report.html").read_text(encoding="utf-8")
    assert "training/first-run" in page and "art-clat evaluate --model resnet18" in page and "8/255" in page
    assert "usage: art-clat submit" in run("art-clat", "submit", "--help")


if __name__ == "__main__":
    main()
