"""A network's parameters and buffers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    pass


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Return a network's parameters and buffers, each once where it has several names.

    :param model: The network.
    :return: By name.
    """
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Copy a network's parameters and buffers.

    :param model: The network.
    :return: By name, on the CPU.
    """
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in named_tensors(model).items()
    }


def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Put back what :func:`weights` copied.

    :param model: The network.
    :param tensors: The copies, and possibly more.
    """
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(tensors[name])
