"""The user's model is a guest: what is changed while working on it is put back, also after an exception."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Put a network in evaluation mode, and every module back in its own mode on leaving.

    :param model: The network.
    """
    with own_modes(model):
        model.eval()
        yield


@contextmanager
def own_modes(model: nn.Module) -> Iterator[None]:
    """
    Put every module back in the mode, training or evaluation, that it had.

    :param model: The network.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """
    Seed the global random generators, and put them back as they were on leaving.

    They are Python's, NumPy's, torch's and, on a GPU, CUDA's: dropout, random starts and ART's own attacks all draw
    from these.

    :param seed: The seed, 0 … 2**32 − 1.
    :param device: Where the network runs.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed_all(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class FiniteGuard:
    """
    Keeps a training step whose loss or gradient is not finite from reaching the network.

    Made before the forward pass, which already moves buffers (BatchNorm statistics); these are put back.

    :param model: The network, before the forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def check_loss(self, loss: torch.Tensor) -> None:
        """
        Check the loss and the buffers after the forward pass.

        :param loss: A scalar.
        :raises FloatingPointError: If one is not finite.
        """
        sums = (buffer.sum() for buffer, _ in self._buffers if buffer.is_floating_point())
        self._check([loss.detach(), *sums], "loss, or a BatchNorm statistic,")

    def check_gradients(self) -> None:
        """
        Check the gradients after the backward pass.

        :raises FloatingPointError: If one is not finite.
        """
        self._check([p.grad.norm() for p in self._model.parameters() if p.grad is not None], "gradient")

    def _check(self, values: list[torch.Tensor], what: str) -> None:
        if not values or torch.isfinite(torch.stack([value.float() for value in values])).all():
            return
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        raise FloatingPointError(f"The {what} is not finite")
