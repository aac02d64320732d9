"""What a run is made of: a seed's images, the network, the trainer, and ART's trainers for other first stages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.defences.trainer import AdversarialTrainerAWPPyTorch, AdversarialTrainerFBFPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torchvision.transforms import v2

from art_clat import (
    AdversarialTrainerCLATPyTorch,
    Budget,
    CropAndFlip,
    LayerOptions,
    PerformanceOptions,
    SelectionOptions,
    create_backbone,
)
from art_clat.models.datasets import load_digits
from paper_tables.configuration import Settings

Examples = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]

NB_CLASSES = 10

#: Options of the trainer's ``layers=`` that an arm's ``trainer`` table names directly.
LAYER_OPTIONS = ("granularity", "predecessor", "after_norm", "freeze_norms", "head_eligible")

AUGMENTATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "none": None,
    "flip": v2.RandomHorizontalFlip(),
    "flip by index": CropAndFlip(padding=0),
    "crop and flip by index": CropAndFlip(),
    "crop and flip": v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]),
}


def load_data(preset: Settings, seed: int, folder: Path | None) -> tuple[Examples, Examples, Examples]:
    """Draw a seed's own training, validation and test images."""
    x: npt.NDArray[Any]
    x_test: npt.NDArray[Any]
    if preset["data"] == "digits":
        x, y = load_digits()
        (x, y), (x_test, y_test) = (x[:1400], y[:1400]), (x[1400:], y[1400:])
    else:
        (x, y), (x_test, y_test) = (_load_cifar10(folder, train=train) for train in (True, False))
    rng = np.random.default_rng(seed)
    order, nb_train = rng.permutation(len(x)), preset["train_images"]
    train, validation = order[:nb_train], order[nb_train : nb_train + preset["validation_images"]]
    test = rng.permutation(len(x_test))[: preset["test_images"]]
    return _take(x, y, train), _take(x, y, validation), _take(x_test, y_test, test)


def _load_cifar10(folder: Path | None, *, train: bool) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Read CIFAR-10 as torchvision keeps it: images in 0 to 255, channels first."""
    from torchvision.datasets import CIFAR10

    dataset = CIFAR10(folder, train=train, download=False)
    return dataset.data.transpose(0, 3, 1, 2), np.array(dataset.targets)


def _take(x: npt.NDArray[Any], y: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]) -> Examples:
    """Return some examples, their images in [0, 1]."""
    images = x[indices]
    return (images if images.dtype == np.float32 else images.astype(np.float32) / np.float32(255)), y[indices]


def input_shape(preset: Settings) -> tuple[int, int, int]:
    """Return the shape of an image."""
    return (1, 8, 8) if preset["data"] == "digits" else (3, 32, 32)


def make_model(preset: Settings, seed: int) -> nn.Module:
    """Make the network of a preset, normalisation inside."""
    torch.manual_seed(seed)
    arguments = copy.deepcopy(preset.get("backbone_arguments", {}))
    model = create_backbone(preset["backbone"], num_classes=NB_CLASSES, input_size=input_shape(preset), **arguments)
    if preset.get("stem_stride", 1) != 1:
        backbone: Any = model.model
        backbone.get_submodule(backbone.default_cfg["first_conv"]).stride = (preset["stem_stride"],) * 2
    return model


def trainer_arguments(preset: Settings, arm_trainer: Settings) -> Settings:
    """
    Translate a preset's settings and an arm's ``trainer`` table to arguments of the trainer.

    The names in ``paper_tables.toml`` belong to the fingerprints of the committed results and stay. If the trainer
    renames an option, this is the one place to change.
    """
    # The package's defaults may change; what an arm leaves out does not.
    options = {
        "objective": "adversarial",
        "freeze_norms": False,
        "reuse_perturbations": None,
        **copy.deepcopy(arm_trainer),
    }
    if isinstance(options.get("budget"), dict):
        # Arms within a share of the parameters were run before layers were taken in order until one does not fit.
        fill = {"fill": True} if "parameter_share" in options["budget"] else {}
        options["budget"] = Budget(**fill, **options["budget"])
    layers = {name: options.pop(name) for name in LAYER_OPTIONS if name in options}
    performance = {name: preset.get(name, False) for name in ("amp", "channels_last")}
    return {
        **options,
        "selection": SelectionOptions(options.get("selection", "criticality"), preset["selection_samples"]),
        "layers": LayerOptions(**layers),
        "augmentation": AUGMENTATIONS[preset.get("augmentation", "none")],
        "performance": PerformanceOptions(**performance),
    }


def make_trainer(
    model: nn.Module,
    preset: Settings,
    *,
    lr: float,
    device: str,
    seed: int,
    arm_trainer: Settings | None = None,
    **arguments: Any,
) -> AdversarialTrainerCLATPyTorch:
    """Make classifier, attack and trainer; `arm_trainer` has the configuration's names, `arguments` the trainer's."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    classifier = _classifier(model, input_shape(preset), optimizer, device)
    attack = ProjectedGradientDescent(
        classifier,
        norm=np.inf,
        eps=preset["eps"],
        eps_step=preset["eps_step"],
        max_iter=preset["attack_steps"],
        num_random_init=1,
        verbose=False,
    )
    options = trainer_arguments(preset, arm_trainer or {})
    return AdversarialTrainerCLATPyTorch(classifier, attack, seed=seed, **options, **arguments)


def _classifier(
    model: nn.Module, shape: tuple[int, ...], optimizer: torch.optim.Optimizer, device: str
) -> PyTorchClassifier:
    """Make ART's classifier."""
    loss = nn.CrossEntropyLoss()
    return PyTorchClassifier(
        model, loss, shape, NB_CLASSES, optimizer=optimizer, clip_values=(0.0, 1.0), device_type=device
    )


def cosine(optimizer: torch.optim.Optimizer, *, first: int, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a cosine schedule over `total` epochs that continues after the `first` ones."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: (1 + np.cos(np.pi * min(1, (first + epoch) / total))) / 2
    )


def awp(trainer: AdversarialTrainerCLATPyTorch, preset: Settings) -> Any:
    """Make ART's trainer with adversarial weight perturbation (Wu et al., 2020), on PGD-AT."""
    classifier = trainer.classifier
    proxy = copy.deepcopy(classifier.model)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    proxy_classifier = _classifier(proxy, classifier.input_shape, optimizer, classifier.device.type)
    return AdversarialTrainerAWPPyTorch(
        classifier, proxy_classifier, trainer.attacks[0], mode="PGD", gamma=0.005, beta=6.0, warmup=0
    )


class OneModule(nn.Module):
    """Wraps an ``nn.Sequential``: ART's FBF trainer takes the output of the first module of one for the logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        return self.network(x)


def fbf(trainer: AdversarialTrainerCLATPyTorch, preset: Settings) -> Any:
    """Make ART's fast adversarial trainer (Wong et al., 2020), which has a learning-rate cycle of its own."""
    classifier = trainer.classifier
    whole = OneModule(classifier.model)
    return AdversarialTrainerFBFPyTorch(
        _classifier(whole, classifier.input_shape, classifier.optimizer, classifier.device.type), eps=preset["eps"]
    )


#: First stages of ART's own trainers.
ART_TRAINERS: dict[str, Callable[[AdversarialTrainerCLATPyTorch, Settings], Any]] = {"awp": awp, "fbf": fbf}
