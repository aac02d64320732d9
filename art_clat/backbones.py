"""timm backbones ready for small images and for RobustBench."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import nn

#: Images with a shorter side up to this are small: a network made for 224 pixels would shrink them to nothing.
SMALL_SIDE = 64


class Normalize(nn.Module):
    """
    Standardise images channel by channel.

    :param mean: One value a channel, in units of the input.
    :param std: One value a channel, in units of the input.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Give ``(x − mean) / std``.

        :param x: Shape (batch, channels, height, width).
        :return: Same shape.
        """
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show the values in ``print(model)``."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def create_backbone(
    name: str,
    *,
    num_classes: int,
    input_size: tuple[int, int, int] = (3, 32, 32),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **kwargs: Any,
) -> nn.Sequential:
    """
    Make a timm network that takes images in [0, 1] of a given size, with the normalisation inside.

    For images of up to 64 pixels a ResNet's stem becomes a 3×3 convolution of stride 1 without pooling, and a ViT's
    patch size an eighth of the shorter side. The result is named as RobustBench names such models: ``normalize``, then
    ``model``, the timm network itself.

    :param name: A timm model name, a ResNet's or a ViT's.
    :param num_classes: Number of classes.
    :param input_size: Channels, height, width.
    :param mean: Mean of each channel, in [0, 1]; `None` for the one timm has for this network.
    :param std: Standard deviation of each channel; `None` for the one timm has for this network.
    :param kwargs: Passed on to ``timm.create_model``, e.g. ``channels=(16, 32, 64, 128)`` for a narrow ResNet.
    :return: The network, in training mode.
    :raises ValueError: If timm does not know the name, sizes are not usable, or small images ask for a stem that this
            function cannot give the network.
    """
    if not isinstance(input_size, (tuple, list)) or len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"`input_size` must be (channels, height, width), each at least 1, got {input_size}.")
    channels, height, width = input_size
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name.lower().replace("-", ""), timm.list_models(), n=3)
        hint = f"; similar names: {', '.join(similar)}" if similar else ""
        raise ValueError(f"`name` must be a model that timm knows (timm.list_models()), got {name!r}{hint}.")
    small = min(height, width) <= SMALL_SIDE
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        kwargs = {"img_size": (height, width), **kwargs}
        if small:
            kwargs = {"patch_size": max(1, min(height, width) // 8), **kwargs}
    try:
        model = timm.create_model(name, num_classes=num_classes, in_chans=channels, **kwargs)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"`name`: timm cannot make {name} with {kwargs}: {error}") from error
    if small:
        if isinstance(model, ResNet):
            _shrink_resnet_stem(model)
        elif "patch_size" not in kwargs:
            raise ValueError(
                f"`name`: images of {height}×{width} need a small stem, which is available for timm's "
                f"ResNet class and ViTs, got {name} ({type(model).__name__})."
            )
    return nn.Sequential(
        OrderedDict(
            normalize=Normalize(
                _per_channel(mean, model.default_cfg["mean"], channels, "mean"),
                _per_channel(std, model.default_cfg["std"], channels, "std"),
            ),
            model=model,
        )
    )


def _shrink_resnet_stem(model: ResNet) -> None:
    """Give a ResNet the stem that is usual for CIFAR: a 3×3 convolution of stride 1, and no pooling."""
    name = model.default_cfg["first_conv"]
    stem = model.get_submodule(name)
    conv = nn.Conv2d(stem.in_channels, stem.out_channels, 3, stride=1, padding=1, bias=stem.bias is not None)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, conv)
    model.maxpool = nn.Identity()


def _per_channel(values: Sequence[float] | None, of_timm: Sequence[float], channels: int, argument: str) -> list[float]:
    if values is None:  # timm's are for colour images
        values = list(of_timm) if len(of_timm) == channels else [sum(of_timm) / len(of_timm)] * channels
    if not isinstance(values, (tuple, list)):
        raise ValueError(f"`{argument}` must have one value for each of {channels} channels, got {values!r}.")
    if len(values) == channels:
        return list(values)
    raise ValueError(f"`{argument}` has {len(values)} values, one for each of {channels} channels is needed.")
