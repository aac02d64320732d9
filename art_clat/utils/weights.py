"""A network's parameters and buffers by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a network's parameters and buffers by name; one that has several names comes once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy a network's parameters and buffers to the CPU, by name."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in named_tensors(model).items()
    }


def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what :func:`weights` copied; further tensors are ignored."""
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(tensors[name])
