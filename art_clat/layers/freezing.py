"""Freeze everything outside some layers, and restore every flag afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from art_clat.layers.kinds import is_norm
from art_clat.layers.layer import Layer


@contextmanager
def only_trainable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """
    Freeze everything outside some layers, and restore every ``requires_grad`` flag on leaving.

    A parameter that was frozen before stays frozen.

    :param model: The network.
    :param layers: The layers whose parameters stay trainable.
    """
    chosen = {p for layer in layers for p in layer.parameters()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, flag in flags:
            parameter.requires_grad_(flag and parameter in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def train_only(model: nn.Module, layers: Sequence[Layer]) -> None:
    """
    Put the norms of some layers in training mode and the rest of the network in evaluation mode.

    So frozen BatchNorms use their stored statistics and leave them unchanged. A norm of these layers stays in
    evaluation mode too if the user froze its parameters, or if it refuses training mode. Dropout is off. A clean and a
    perturbed pass then differ by the perturbation alone, and by the batch statistics of the norms that train.
    """
    model.train()
    norms = {m for layer in layers for module in layer.modules for m in module.modules() if is_norm(m)}
    trained = [norm for norm in norms if norm.training and not _is_frozen(norm)]
    model.eval()
    for norm in trained:
        norm.training = True  # not `train()`: modules within it, such as dropout, keep their mode


def train_all(model: nn.Module) -> None:
    """Put a network in training mode, except norms whose parameters the user froze."""
    model.train()
    for norm in filter(is_norm, model.modules()):
        if _is_frozen(norm):
            norm.eval()


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
