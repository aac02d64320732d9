"""A short training of ResNet-18 on CIFAR-10, which continues where it was stopped."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from safetensors.torch import save
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from art_clat import AdversarialTrainerCLATPyTorch, PerformanceOptions, create_backbone

NB_EPOCHS, WARMUP = 3, 2
NB_VALIDATION = 1000

Images = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


def load_images(folder: Path | None, unpacked: Path) -> Images:
    """
    Load CIFAR-10's training images.

    :param folder: Has torchvision's ``cifar-10-batches-py``, or a script ``unpack.py`` that writes it to the folder
           that is its argument; `None` for a few random images.
    :param unpacked: Where that script writes to.
    :return: Images in [0, 1], shape (n, 3, 32, 32), and index labels.
    :raises SystemExit: If the folder has neither.
    """
    if folder is None:
        rng = np.random.default_rng(0)
        return rng.random((32, 3, 32, 32), dtype=np.float32), rng.integers(0, 10, 32)
    if not (folder / CIFAR10.base_folder).is_dir():
        if not (folder / "unpack.py").is_file():
            raise SystemExit(f"`--data` must have {CIFAR10.base_folder} or a script unpack.py in it: {folder}")
        if not (unpacked / CIFAR10.base_folder).is_dir():
            subprocess.run([sys.executable, folder / "unpack.py", unpacked], check=True)
        folder = unpacked
    dataset = CIFAR10(folder, train=True, download=False)
    return dataset.data.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255), np.array(dataset.targets)


def train(images: Images, *, device: str, output: Path) -> None:
    """
    Train, validate on the last images, and write ``history.json`` and ``weights.safetensors``.

    :param images: Images and labels.
    :param device: ``"cuda"``, or ``"cpu"`` for a network an eighth as wide.
    :param output: Folder of the results and of the checkpoint.
    """
    torch.manual_seed(0)
    on_gpu = device == "cuda"
    narrow: dict[str, Any] = {} if on_gpu else {"channels": (8, 16, 32, 64), "stem_width": 8}
    model = create_backbone("resnet18", num_classes=10, **narrow)
    classifier = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        (3, 32, 32),
        10,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        clip_values=(0.0, 1.0),
        device_type="gpu" if on_gpu else "cpu",
    )
    attack = ProjectedGradientDescent(
        classifier, eps=8 / 255, eps_step=2 / 255, max_iter=10, num_random_init=1, verbose=False
    )
    trainer = AdversarialTrainerCLATPyTorch(
        classifier,
        attack,
        warmup=WARMUP,
        augmentation=v2.RandomHorizontalFlip(),
        performance=PerformanceOptions(amp=on_gpu, channels_last=on_gpu),
        seed=0,
    )
    (x, y), held_out = images, min(NB_VALIDATION, len(images[0]) // 4)
    trainer.fit(
        x[:-held_out],
        y[:-held_out],
        validation_data=(x[-held_out:], y[-held_out:]),
        nb_epochs=NB_EPOCHS,
        checkpoint=output / "checkpoint",
        checkpoint_every=50,
        verbose=False,
    )
    trainer.history.to_json(output / "history.json")
    (output / "weights.safetensors").write_bytes(save(model.state_dict()))
    for record in trainer.history.epochs:
        print(record)


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(prog="bare_machine.training", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--unpacked", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    train(load_images(args.data, args.unpacked), device=args.device, output=args.output)


if __name__ == "__main__":
    main()
