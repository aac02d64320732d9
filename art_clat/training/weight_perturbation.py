"""Adversarial weight perturbation, AWP (Wu et al., NeurIPS 2020, arXiv 2004.05884)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from art_clat.utils.weights import move, perturbable, put_back


@contextmanager
def perturbed_weights(model: nn.Module, size: float) -> Iterator[None]:
    """
    Move the trainable weights along their gradients in this context, and put them back to the bit on leaving.

    Each weight tensor w moves by γ·‖w‖ along its gradient g, to w + γ·‖w‖·g/‖g‖, as in the authors' code. All
    gradients are dropped before the context begins.

    :param model: The network, with the gradients of the loss that the weights climb.
    :param size: γ, at least 0.
    """
    trained = [parameter for parameter in perturbable(model) if parameter.requires_grad]
    with put_back(trained):
        move(trained, [parameter.grad for parameter in trained], size)
        model.zero_grad(set_to_none=True)
        yield
