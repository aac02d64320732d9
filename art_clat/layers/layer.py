"""One layer of a network, and where its feature is seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Site:
    """
    Where a tensor is seen in a forward pass: as it enters or leaves a module.

    :param module: The module.
    :param enters: `True` if the tensor enters the module, `False` if it leaves it.
    :param weight: The module's weight if a function takes it without the module being called; the tensors are then
           those that enter and leave that function. Otherwise `None`.
    :param index: Position of the tensor among those that enter or leave: it is the first one with a batch.
    :param calls: How often it is seen in one forward pass; more than once if weights are shared.
    :param shape: Shape for one sample, without the batch dimension.
    :param size: ``N_i``, the number of elements of one sample, over all `calls`.
    :param batch_dim: The batch dimension. Its length may be a multiple of the batch size (windows, time steps).
    :param rows: Number of entries that one sample has along the batch dimension, call by call.
    :param interleaved: `True` if a sample's entries are one batch size apart (time steps before the batch), `False` if
           they follow one another (windows).
    """

    module: nn.Module
    enters: bool
    weight: nn.Parameter | None
    index: int
    calls: int
    shape: tuple[int, ...]
    size: int
    batch_dim: int
    rows: tuple[int, ...]
    interleaved: bool = False

    def by_sample(self, tensor: torch.Tensor, call: int) -> torch.Tensor:
        """
        Bring a tensor that is seen here into the order (sample, entry of the sample, ...).

        :param tensor: The tensor, as it enters or leaves.
        :param call: Number of the call within the forward pass, from 0.
        :return: A view, shape (batch, ...), or (batch, rows, ...) if a sample has several entries.
        """
        first, rows = tensor.movedim(self.batch_dim, 0), self.rows[call]
        if rows == 1:
            return first
        shape = first.shape[1:]
        return first.view(rows, -1, *shape).movedim(0, 1) if self.interleaved else first.view(-1, rows, *shape)


@dataclass(frozen=True, eq=False)
class Layer:
    """
    One layer of a network: a weighted module and the norm on its output, or the modules of a block.

    :param name: Name of the weighted module, as in ``model.named_modules()``, or of the block.
    :param modules: The weighted module, then the norms that take its output; or the modules of the block.
    :param output: Where the layer's feature ``F_i(x)`` is seen.
    :param input: Where the tensor that enters the layer is seen; `None` if no tensor with a batch does.
    :param extra_parameters: Parameters of the layer besides those that its modules hold; for a block, all parameters.
    :param is_head: Whether the layer computes the class scores.
    """

    name: str
    modules: tuple[nn.Module, ...]
    output: Site
    input: Site | None = None
    extra_parameters: tuple[nn.Parameter, ...] = ()
    is_head: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the feature of one sample, without the batch dimension."""
        return self.output.shape

    @property
    def size(self) -> int:
        """``N_i``, the number of elements of one sample's feature, over all calls of the layer."""
        return self.output.size

    def parameters(self) -> list[nn.Parameter]:
        """Return the layer's parameters, each once, those of its norm included."""
        in_modules = [parameter for module in self.modules for parameter in module.parameters()]
        return list(dict.fromkeys([*in_modules, *self.extra_parameters]))

    @property
    def nb_parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(p.numel() for p in self.parameters())
