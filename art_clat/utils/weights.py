"""A network's parameters and buffers by name, and weights that are moved for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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


@contextmanager
def put_back(parameters: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    """Yield copies of parameters, and write these back on leaving."""
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        yield originals
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)


def perturbable(model: nn.Module) -> list[nn.Parameter]:
    """
    Return the parameters that a weight perturbation moves, as in the code of AWP (arXiv 2004.05884).

    These are the tensors of two or more dimensions whose name contains "weight". Biases, norms, scales, class tokens
    and position tables stay.
    """
    return [parameter for name, parameter in model.named_parameters() if parameter.ndim > 1 and "weight" in name]


@torch.no_grad()
def move(parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor | None], size: float) -> None:
    """
    Move each parameter along its gradient, by `size` times the parameter's own Euclidean length.

    A parameter without a gradient, or with a gradient of zero, stays.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            direction = gradient / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
            parameter.add_(size * parameter.norm() * direction)
