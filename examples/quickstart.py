"""
PGD adversarial training against CLAT on handwritten digits, in a few minutes on a CPU.

    python examples/quickstart.py

A small timm ResNet is trained adversarially (PGD-AT). From that one checkpoint two arms go on for as many epochs, with
the same data order, attack and learning-rate schedule: PGD-AT on the whole network, and CLAT on its critical layers.
The table compares them on digits neither has seen; histories, plots, weights and RobustBench-format entries are written
under ``runs/quickstart/``. One seed of one small data set shows how to use the package, not which method is better.
"""

import argparse
import copy
import json
import logging
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from sklearn.model_selection import train_test_split
from torch import nn

from art_clat import AdversarialTrainerCLATPyTorch, create_backbone, evaluate_robustness, write_robustbench_entry
from art_clat.models.datasets import load_digits
from art_clat.utils.environment import describe_environment
from art_clat.utils.plots import save

EPS = 0.1  # ℓ∞, for pixels in [0, 1]


def load_data():
    """Split scikit-learn's 1,797 digits of 8×8 pixels into training, validation and test."""
    x, y = load_digits()
    x_train, x_rest, y_train, y_rest = train_test_split(x, y, train_size=1200, stratify=y, random_state=0)
    x_val, x_test, y_val, y_test = train_test_split(x_rest, y_rest, train_size=200, stratify=y_rest, random_state=0)
    return (x_train, y_train), (x_val, y_val), (x_test, y_test)


def make_classifier(model):
    """Wrap a network for ART, with a fresh optimiser."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer=optimizer, clip_values=(0.0, 1.0), device_type="cpu"
    )


def train(model, train_data, validation_data, *, epochs, seed, **clat):
    """Train with a cosine schedule; ``warmup=epochs`` makes it plain PGD-AT."""
    classifier = make_classifier(model)
    attack = ProjectedGradientDescent(
        classifier, norm=np.inf, eps=EPS, eps_step=EPS / 4, max_iter=7, num_random_init=1, verbose=False
    )
    trainer = AdversarialTrainerCLATPyTorch(classifier, attack, seed=seed, **clat)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(classifier.optimizer, T_max=epochs)
    trainer.fit(*train_data, validation_data=validation_data, nb_epochs=epochs, scheduler=scheduler)
    return classifier, trainer.history


def trained_parameters(history, total):
    """Say how many parameters were trained: all, or from the smallest to the largest selection."""
    counts = [record.trainable_parameters for record in history.selections] or [total]
    return " to ".join(f"{count:,} ({100 * count / total:.3g} %)" for count in sorted({min(counts), max(counts)}))


def main():
    """Train both arms, evaluate them, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for the results")
    parser.add_argument("--epochs", type=int, default=20, help="epochs before, and again in each arm")
    parser.add_argument("--test-examples", type=int, default=200, help="held-out digits to evaluate on (up to 397)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("art").setLevel(logging.WARNING)
    args.output.mkdir(parents=True, exist_ok=True)

    train_data, validation_data, (x_test, y_test) = load_data()
    torch.manual_seed(args.seed)
    model = create_backbone("resnet10t", num_classes=10, input_size=(1, 8, 8), channels=(16, 32, 64, 128), stem_width=8)
    print(f"PGD-AT, {args.epochs} epochs of the whole network")
    train(model, train_data, validation_data, epochs=args.epochs, seed=args.seed, warmup=args.epochs)

    rows = []
    for arm, title, clat in (
        ("pgd_at", "PGD-AT continued", {"warmup": args.epochs}),
        ("clat", "CLAT", {"warmup": 0, "reselect_every": max(1, args.epochs // 4)}),
    ):
        print(f"{title}, {args.epochs} epochs")
        classifier, history = train(
            copy.deepcopy(model), train_data, validation_data, epochs=args.epochs, seed=args.seed + 1, **clat
        )
        history.to_json(args.output / f"{arm}-history.json")
        save(history.plot_curves(), args.output / f"{arm}-curves.png")
        (args.output / f"{arm}.safetensors").write_bytes(safetensors.torch.save(classifier.model.state_dict()))
        if history.selections:
            save(history.plot_heat_map(), args.output / "heat-map.png")
            save(history.selections[-1].measured.plot(), args.output / "criticality.png")
            print(history.selections[-1].measured)
        print(f"{title}: AutoAttack on {args.test_examples} held-out digits")
        report = evaluate_robustness(
            classifier, x_test[: args.test_examples], y_test[: args.test_examples], norm="Linf", eps=EPS
        )
        write_robustbench_entry(
            report,
            model_id=f"Quickstart_{arm}",
            dataset="digits",
            directory=args.output,
            name=f"{title} on scikit-learn's digits (example of the package art_clat)",
            architecture="ResNet-10 (timm resnet10t), quarter width",
        )
        total = sum(p.numel() for p in classifier.model.parameters())
        rows.append((title, report, trained_parameters(history, total), history))

    lines = [
        "| arm | clean | PGD-20 | AutoAttack | trainable parameters | seconds an epoch, selections included |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for title, report, trained, history in rows:
        seconds = sum(record.seconds for record in [*history.epochs, *history.selections]) / len(history.epochs)
        accuracies = (report.clean_accuracy, report.pgd_accuracy, report.autoattack_accuracy)
        cells = " | ".join(f"{100 * accuracy:.1f} %" for accuracy in accuracies)
        lines.append(f"| {title} | {cells} | {trained} | {seconds:.2f} |")
    setting = {
        "command": f"python examples/quickstart.py --epochs {args.epochs} --test-examples {args.test_examples} "
        f"--seed {args.seed}",
        "test": f"{len(rows[0][1].clean)} held-out digits, Linf, eps = {EPS}",
        **describe_environment(),
    }
    (args.output / "run.json").write_text(json.dumps(setting, indent=2) + "\n")
    table = "\n".join(lines)
    (args.output / "table.md").write_text(f"{table}\n\n```json\n{json.dumps(setting, indent=2)}\n```\n")
    print(f"\n{table}\n\nEverything else is in {args.output}.")


if __name__ == "__main__":
    main()
