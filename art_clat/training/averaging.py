"""An exponential moving average of a network's weights over the steps of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from art_clat.utils.weights import load_weights, named_tensors, weights


class Average:
    """
    Averages parameters and buffers over training, the recent ones weighing more (Polyak averaging).

    :param model: The network.
    :param decay: Weight of the average so far against that of the next step, in [0, 1). In the first steps it is lower,
           ``(1 + n) / (10 + n)`` after n of them, so that random weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
        self._averaged = {  # not a mask of −∞, nor a count
            name
            for name, tensor in self._tensors.items()
            if tensor.is_floating_point() and bool(torch.isfinite(tensor).all())
        }

    @classmethod
    def of(cls, model: nn.Module, decay: float | None) -> Average | None:
        """
        Make an average if one is wanted.

        :param model: The network.
        :param decay: Its decay, or `None`.
        :return: The average, or `None`.
        """
        return None if decay is None else cls(model, decay)

    def begin(self) -> None:
        """Begin with the weights as they are."""
        for name, tensor in named_tensors(self._model).items():
            self._tensors[name].copy_(tensor.detach())

    def update(self, step: int) -> None:
        """
        Take in the weights as they are.

        :param step: How many were taken in before.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in named_tensors(self._model).items():
                if name in self._averaged:
                    self._tensors[name].lerp_(tensor, 1 - decay)
                else:
                    self._tensors[name].copy_(tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the network run on the average in this context, and on its own weights afterwards."""
        own = weights(self._model)
        load_weights(self._model, self._tensors)
        try:
            yield
        finally:
            load_weights(self._model, own)

    def apply(self) -> None:
        """Put the average into the network."""
        load_weights(self._model, self._tensors)

    def state(self) -> dict[str, torch.Tensor]:
        """
        Copy the average.

        :return: By name, on the CPU.
        """
        return {
            name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in self._tensors.items()
        }

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """
        Go on from what :meth:`state` gave.

        :param state: The copies.
        :raises KeyError: If one is missing.
        """
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])
