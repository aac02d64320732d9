"""The networks that are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from art_clat import create_backbone
from art_clat.models.backbones import Normalize


class Whole(nn.Module):
    """A network that is no ``nn.Sequential``: ART's TRADES takes the output of such a network's first module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the network's output."""
        return self.network(x)  # type: ignore[no-any-return]


def small_cnn() -> nn.Module:
    """Make six convolutions with BatchNorm, about 300,000 parameters."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def convnext() -> nn.Module:
    """Make timm's smallest ConvNeXt, with a stem of stride 1 for small images."""
    model: Any = timm.create_model("convnext_atto", num_classes=10, patch_size=1)
    return nn.Sequential(Normalize((0.5,) * 3, (0.25,) * 3), model)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small CNN": small_cnn,
    "ResNet-18": lambda: create_backbone("resnet18", num_classes=10),
    "ViT-tiny": lambda: create_backbone("vit_tiny_patch16_224", num_classes=10),
    "ConvNeXt-atto": convnext,
}

#: Batches in an epoch by default: enough that what an epoch costs whatever its length counts for little.
BATCHES = {"small CNN": 4}
