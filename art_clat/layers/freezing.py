"""Freeze everything outside some layers, and put every flag back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from art_clat.layers.kinds import is_norm
from art_clat.layers.layer import Layer


@contextmanager
def only_trainable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """
    Freeze everything outside some layers, and put every ``requires_grad`` flag back on leaving.

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

    Frozen BatchNorms then run on their stored statistics, which stay as they are, and so does a norm of these layers
    whose parameters its owner has frozen, or that stays in evaluation mode when the network is put in training mode.
    Dropout is off: between a clean and a perturbed pass only the perturbation
    differs, but for the batch statistics of these norms.

    :param model: The network.
    :param layers: The layers that are trained.
    """
    model.train()
    norms = {m for layer in layers for module in layer.modules for m in module.modules() if is_norm(m)}
    trained = [norm for norm in norms if norm.training and not _is_frozen(norm)]
    model.eval()
    for norm in trained:
        norm.training = True  # what is within it, dropout say, stays as it is


def train_all(model: nn.Module) -> None:
    """
    Put a network in training mode, but for norms whose parameters their owner has frozen.

    :param model: The network.
    """
    model.train()
    for norm in filter(is_norm, model.modules()):
        if _is_frozen(norm):
            norm.eval()


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
