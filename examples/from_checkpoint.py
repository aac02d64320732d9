"""
Somebody's robust CIFAR-10 network → CLAT → AutoAttack → RobustBench entry.

    python examples/from_checkpoint.py --model Wong2020Fast
    python examples/from_checkpoint.py --model preactresnet18_cifar --checkpoint weights.pt

The network is RobustBench's, by its identifier (downloaded to ``--model-dir`` unless it is there), or any other with a
file of weights: a timm name, a RobustBench identifier, or ``file.py:function``. Nothing in the file is executed. The
checkpoint is evaluated before and after CLAT, on the same images: more epochs are no gain by themselves. The run saves
itself under ``--output``. Killed, the same command continues it.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from art_clat import AdversarialTrainerCLATPyTorch, Budget, evaluate_robustness, write_robustbench_entry
from art_clat.models.by_name import load_model
from art_clat.utils.plots import save

EPS = 8 / 255


def load_cifar10(folder, *, train):
    """Return CIFAR-10 as ART takes it: images in [0, 1], channels first."""
    dataset = CIFAR10(folder, train=train, download=True)
    return dataset.data.transpose(0, 3, 1, 2).astype(np.float32) / 255, np.array(dataset.targets)


def main():
    """Load, evaluate, train, evaluate again, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a RobustBench identifier, a timm name, or file.py:function")
    parser.add_argument("--checkpoint", type=Path, help="weights: .safetensors, or a state_dict of torch.save")
    parser.add_argument("--model-dir", type=Path, default=Path("models"), help="where RobustBench keeps its weights")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of torchvision's CIFAR-10")
    parser.add_argument("--output", type=Path, default=Path("runs/from_checkpoint"), help="folder for the results")
    parser.add_argument("--subset", type=int, default=49_000, help="training images; the last 1,000 validate")
    parser.add_argument("--validation", type=int, default=200, help="validation images, up to 1,000")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of CLAT")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate at the beginning; a cosine to zero")
    parser.add_argument("--test-examples", type=int, default=100, help="test images to run AutoAttack on")
    parser.add_argument("--model-id", default="CLAT_from_checkpoint", help="name of the RobustBench entry")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("art").setLevel(logging.WARNING)
    args.output.mkdir(parents=True, exist_ok=True)

    model = load_model(
        args.model,
        dataset="cifar10",
        norm="Linf",
        nb_classes=10,
        input_size=(3, 32, 32),
        checkpoint=args.checkpoint,
        model_dir=args.model_dir,
    )
    if isinstance(model, PyTorchClassifier):  # a file.py:function may return one
        model = model.model
    x, y = load_cifar10(args.data, train=True)
    x_test, y_test = (part[: args.test_examples] for part in load_cifar10(args.data, train=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), 10, optimizer=optimizer, clip_values=(0.0, 1.0)
    )
    before = evaluate_robustness(classifier, x_test, y_test, norm="Linf", eps=EPS)

    attack = ProjectedGradientDescent(
        classifier, norm=np.inf, eps=EPS, eps_step=2 / 255, max_iter=10, num_random_init=1, verbose=False
    )
    trainer = AdversarialTrainerCLATPyTorch(
        classifier,
        attack,
        warmup=0,  # the network is adversarially trained already
        budget=Budget(parameter_share=0.05),
        augmentation=v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]),
        seed=args.seed,
    )
    training, validation = slice(min(args.subset, 49_000)), slice(49_000, 49_000 + args.validation)
    trainer.fit(
        x[training],
        y[training],
        validation_data=(x[validation], y[validation]),
        nb_epochs=args.epochs,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs),
        checkpoint=args.output / "checkpoint",
        restore_best=True,
    )
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (args.output / "clat.safetensors").write_bytes(safetensors.torch.save(weights))
    trainer.history.to_json(args.output / "history.json")
    save(trainer.history.plot_heat_map(), args.output / "heat-map.png")

    after = evaluate_robustness(classifier, x_test, y_test, norm="Linf", eps=EPS)
    for title, report in (("as it came", before), ("after CLAT", after)):
        print(
            f"{title}: clean {report.clean_accuracy:.1%}, PGD-20 {report.pgd_accuracy:.1%}, "
            f"AutoAttack {report.autoattack_accuracy:.1%}"
        )
    entry = write_robustbench_entry(
        after,
        model_id=args.model_id,
        dataset="cifar10",
        directory=args.output,
        footnote=f"{args.model}, then {args.epochs} epochs of CLAT.",
    )
    print(f"RobustBench entry: {entry}")


if __name__ == "__main__":
    main()
