"""
CLAT on CIFAR-10 with a ResNet-18: PGD-AT first, then CLAT on the critical layers.

    python examples/cifar10_resnet18.py --data data                          # the paper's schedule; wants a GPU
    python examples/cifar10_resnet18.py --subset 500 --epochs 4 --warmup 2   # minutes on a CPU

The data are torchvision's, downloaded to ``--data`` unless they are there. Threat model and attack are the paper's:
ℓ∞, ε = 8/255, PGD-10 with steps of 2/255. Training images are cropped and flipped at random. The run saves itself under
``--output``. Killed, the same command continues it.
"""

import argparse
import json
import logging
import shlex
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from art_clat import (
    AdversarialTrainerCLATPyTorch,
    PerformanceOptions,
    create_backbone,
    evaluate_robustness,
    write_robustbench_entry,
)
from art_clat.utils.plots import save

EPS = 8 / 255


def load_cifar10(folder, *, train):
    """Return CIFAR-10 as ART takes it: images in [0, 1], channels first."""
    dataset = CIFAR10(folder, train=train, download=True)
    return dataset.data.transpose(0, 3, 1, 2).astype(np.float32) / 255, np.array(dataset.targets)


def main():
    """Train, evaluate, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of torchvision's CIFAR-10")
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10_resnet18"), help="folder for the results")
    parser.add_argument("--subset", type=int, default=49_000, help="training images; the last 1,000 validate")
    parser.add_argument("--epochs", type=int, default=100, help="epochs altogether")
    parser.add_argument("--warmup", type=int, default=50, help="epochs of PGD-AT among them")
    parser.add_argument("--reselect-every", type=int, default=10)
    parser.add_argument("--objective", choices=("adversarial", "clean"), default="adversarial")
    parser.add_argument("--test-examples", type=int, default=100, help="test images to run AutoAttack on")
    parser.add_argument("--validation", type=int, default=200, help="validation images, up to 1,000")
    parser.add_argument("--amp", action="store_true", help="train in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("art").setLevel(logging.WARNING)
    args.output.mkdir(parents=True, exist_ok=True)

    x, y = load_cifar10(args.data, train=True)
    x_test, y_test = load_cifar10(args.data, train=False)
    validation = slice(49_000, 49_000 + args.validation)
    torch.manual_seed(args.seed)
    model = create_backbone("resnet18", num_classes=10, input_size=(3, 32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), 10, optimizer=optimizer, clip_values=(0.0, 1.0)
    )
    attack = ProjectedGradientDescent(
        classifier, norm=np.inf, eps=EPS, eps_step=2 / 255, max_iter=10, num_random_init=1, verbose=False
    )
    trainer = AdversarialTrainerCLATPyTorch(
        classifier,
        attack,
        warmup=args.warmup,
        reselect_every=args.reselect_every,
        objective=args.objective,
        augmentation=v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]),
        performance=PerformanceOptions(amp=args.amp),
        seed=args.seed,
    )
    trainer.fit(
        x[: min(args.subset, 49_000)],
        y[: min(args.subset, 49_000)],
        validation_data=(x[validation], y[validation]),
        nb_epochs=args.epochs,
        scheduler=scheduler,
        checkpoint=args.output / "checkpoint",
    )

    (args.output / "clat.safetensors").write_bytes(safetensors.torch.save(model.state_dict()))
    trainer.history.to_json(args.output / "history.json")
    command = shlex.join(["python", "examples/cifar10_resnet18.py", *sys.argv[1:]])
    (args.output / "run.json").write_text(json.dumps({"command": command}) + "\n")
    save(trainer.history.plot_curves(), args.output / "curves.png")
    if trainer.history.selections:
        save(trainer.history.plot_heat_map(), args.output / "heat-map.png")
        print(trainer.history.selections[-1].measured)
    for record in trainer.history.epochs:
        print(
            f"epoch {record.epoch:3d}  {record.stage:<20}  loss {record.loss:.3f}  {record.seconds:6.1f} s  "
            f"validation clean {record.clean_accuracy:.1%}  robust {record.robust_accuracy:.1%}"
        )
    report = evaluate_robustness(
        classifier, x_test[: args.test_examples], y_test[: args.test_examples], norm="Linf", eps=EPS
    )
    print(report)
    entry = write_robustbench_entry(
        report,
        model_id="CLAT_R18",
        dataset="cifar10",
        directory=args.output,
        link="https://arxiv.org/abs/2408.10204",
        name="Criticality Leveraged Adversarial Training (CLAT) for Boosted Performance via Parameter Efficiency",
        architecture="ResNet-18",
        footnote=f"Trained on {min(args.subset, 49_000)} images for {args.epochs} epochs.",
    )
    print(f"RobustBench entry: {entry}")


if __name__ == "__main__":
    main()
