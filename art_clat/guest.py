"""The user's model is a guest: what is changed while working on it is put back, also after an exception."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from art_clat.distributed import Ranks


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
def own_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """
    Leave running statistics, and whatever other buffers, of what is in training mode as they are.

    They are exchanged for copies meanwhile, not written over: autograd may still need what it saw.

    :param modules: The modules, with the norms in them.
    """
    kept = [
        (part, name, buffer)
        for part in dict.fromkeys(part for module in modules for part in module.modules())
        if part.training
        for name, buffer in part.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


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
            reseed(device, seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def reseed(device: torch.device, *counters: int) -> None:
    """
    Seed the global random generators with numbers that say where a run stands.

    What is drawn at random in a batch then follows from the seed, the epoch and the batch alone: a run that is
    continued draws what it would have drawn, and so does every process of several.

    :param device: Where the network runs.
    :param counters: Whole numbers of at least 0, such as seed, epoch and batch.
    """
    python, numpy, one, other = (
        int(word) for word in np.random.SeedSequence([len(counters), *counters]).generate_state(4)
    )
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(one << 32 | other)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(one << 32 | other)


class FiniteGuard:
    """
    Puts a network back where it was last seen finite after a training step that made it, or its loss, not finite.

    A buffer that is not finite to begin with, such as a mask of −∞, is none of its concern.

    :param model: The network.
    :param every: Look after so many batches. A look makes the processor wait for the device.
    :param ranks: The processes that train it: what one of them sees counts for all.
    """

    def __init__(self, model: nn.Module, *, every: int, ranks: Ranks | None = None) -> None:
        self._every = every
        self._ranks = ranks or Ranks()
        self._batch = 0
        buffers = [buffer for buffer in model.buffers() if bool(torch.isfinite(buffer).all())]
        self._tensors = [*(p for p in model.parameters() if p.requires_grad), *buffers]
        self._good = [tensor.detach().clone() for tensor in self._tensors]

    def before_step(self, loss: torch.Tensor) -> None:
        """
        Check the loss, and the BatchNorm statistics that its forward pass has moved.

        :param loss: The loss.
        :raises FloatingPointError: If they are not finite; weights and buffers are those last seen finite then.
        """
        self._batch += 1
        if self._batch % self._every == 0:
            self._check("loss, or a BatchNorm statistic,", loss)

    def after_step(self, *, look: bool = False) -> None:
        """
        Check what the optimiser's step has made of the network, and remember it if it is finite.

        :param look: Do so whichever batch it is.
        :raises FloatingPointError: As :meth:`before_step`.
        """
        if look or self._batch % self._every == 0:
            self._check("result of the optimiser's step")
            for good, tensor in zip(self._good, self._tensors, strict=True):
                good.copy_(tensor.detach())

    def _check(self, what: str, *values: torch.Tensor) -> None:
        tensors = [*values, *self._tensors]
        finite = torch.stack([torch.isfinite(tensor.detach()).all() for tensor in tensors]).all()
        if self._ranks.sum((~finite).float()) == 0:
            return
        with torch.no_grad():
            for good, tensor in zip(self._good, self._tensors, strict=True):
                tensor.copy_(good)
        raise FloatingPointError(f"The {what} is not finite")
