"""Undo a training step whose result is not finite."""

from __future__ import annotations

import torch
from torch import nn

from art_clat.utils.processes import Ranks


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
