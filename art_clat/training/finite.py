"""Undo a training step whose result is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from art_clat.utils.processes import Ranks


class FiniteGuard:
    """
    Restores a network's last finite state after a step that made the loss or the network not finite.

    Buffers that are not finite from the beginning, such as a mask of −∞, are ignored.

    :param model: The network.
    :param every: Check after so many batches. On a GPU a check makes the processor wait.
    :param ranks: The processes that train it; all of them undo the step if one does.
    """

    def __init__(self, model: nn.Module, *, every: int, ranks: Ranks | None = None) -> None:
        self._every = every
        self._ranks = ranks or Ranks()
        self._batch = 0
        buffers = [buffer for buffer in model.buffers() if bool(torch.isfinite(buffer).all())]
        self._tensors = [*(p for p in model.parameters() if p.requires_grad), *buffers]
        self._good = [tensor.detach().clone() for tensor in self._tensors]

    def before_step(self, loss: torch.Tensor) -> None:
        """Check the loss, and the BatchNorm statistics that its forward pass moved."""
        self._batch += 1
        if self._batch % self._every == 0:
            self._check("loss, or a BatchNorm statistic,", loss)

    def after_step(self, *, look: bool = False) -> None:
        """Check the result of the optimiser's step and remember it; `look` checks after this batch in any case."""
        if look or self._batch % self._every == 0:
            self._check("result of the optimiser's step")
            for good, tensor in zip(self._good, self._tensors, strict=True):
                good.copy_(tensor.detach())

    def _check(self, what: str, *values: torch.Tensor) -> None:
        """Restore the last finite state and raise a FloatingPointError if a value is not finite in some process."""
        tensors = [*values, *self._tensors]
        finite = torch.stack([torch.isfinite(tensor.detach()).all() for tensor in tensors]).all()
        if self._ranks.sum((~finite).float()) == 0:
            return
        with torch.no_grad():
            for good, tensor in zip(self._good, self._tensors, strict=True):
                tensor.copy_(good)
        raise FloatingPointError(f"The {what} is not finite")


@contextmanager
def explained(
    optimizer: torch.optim.Optimizer, where: str, criticality_weight: float, weight_perturbation: float
) -> Iterator[None]:
    """Say in the error of a :class:`FiniteGuard` where in the run it came, and what to do."""
    learning_rate = float(optimizer.param_groups[0]["lr"])
    try:
        yield
    except FloatingPointError as error:
        optimizer.state.clear()  # it may not be finite either
        also = f", `weight_perturbation` ({weight_perturbation:g})" if weight_perturbation else ""
        raise FloatingPointError(
            f"{error} in {where}. The last finite weights are restored. Probably the learning rate (now "
            f"{learning_rate:g}){also} or `criticality_weight` ({criticality_weight:g}) is too large: use a smaller "
            "one."
        ) from None
