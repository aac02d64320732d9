"""A copy of a network's weights, and their exponential moving average over the steps of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from art_clat.utils.weights import load_weights, named_tensors, weights


class Snapshot:
    """A copy of a network's parameters and buffers, on their devices."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}

    def take(self) -> None:
        """Copy the current weights."""
        for name, tensor in named_tensors(self._model).items():
            self._tensors[name].copy_(tensor.detach())

    def apply(self) -> None:
        """Put the copy into the network."""
        load_weights(self._model, self._tensors)

    def state(self) -> dict[str, torch.Tensor]:
        """Copy the tensors to the CPU, by name."""
        return {
            name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in self._tensors.items()
        }

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what :meth:`state` returned; a KeyError if a tensor is missing."""
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])


class Average(Snapshot):
    """
    Averages parameters and buffers over the steps of training, the latest weighing most (Polyak averaging).

    :param model: The network.
    :param decay: Weight of the previous average in a step, in [0, 1). After n steps it is at most ``(1 + n) / (10 +
           n)``, so that the first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._decay = decay
        self._averaged = {  # neither counts nor masks of −∞, which are copied
            name
            for name, tensor in self._tensors.items()
            if tensor.is_floating_point() and bool(torch.isfinite(tensor).all())
        }

    @classmethod
    def of(cls, model: nn.Module, decay: float | None) -> Average | None:
        """Return an average with this decay; `None` if `decay` is `None`."""
        return None if decay is None else cls(model, decay)

    def begin(self) -> None:
        """Set the average to the current weights."""
        self.take()

    def update(self, step: int) -> None:
        """Move the average towards the current weights; `step` counts the earlier updates."""
        decay = min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in named_tensors(self._model).items():
                if name in self._averaged:
                    self._tensors[name].lerp_(tensor, 1 - decay)
                else:
                    self._tensors[name].copy_(tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the network in this context, and the weights back on leaving."""
        current = weights(self._model)
        load_weights(self._model, self._tensors)
        try:
            yield
        finally:
            load_weights(self._model, current)
