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
    Puts a network back as it was before a training step that made it, or its loss, not finite.

    :param model: The network, before the forward pass, which already moves BatchNorm statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [*(p for p in model.parameters() if p.requires_grad), *model.buffers()]
        self._before = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def check(self, what: str, *values: torch.Tensor) -> None:
        """
        Check the network's weights and buffers, and some values.

        :param what: What has just been done, for the message.
        :param values: Further tensors to check.
        :raises FloatingPointError: If one of them is not finite; weights and buffers are as before then.
        """
        tensors = [*values, *(tensor for tensor, _ in self._before)]
        if torch.stack([torch.isfinite(tensor.detach()).all() for tensor in tensors]).all():
            return
        with torch.no_grad():
            for tensor, before in self._before:
                tensor.copy_(before)
        raise FloatingPointError(f"The {what} is not finite")
