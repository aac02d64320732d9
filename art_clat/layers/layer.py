"""One layer of a network, and where its feature is seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Site:
    """
    Where a tensor is seen in a forward pass: it enters or leaves a module.

    :param module: The module.
    :param enters: Whether the tensor enters, or leaves.
    :param weight: `None`, or the module's weight where other modules use it without calling the module. The tensors are
           then those that enter and leave the function that takes it.
    :param index: Which tensor it is of those that enter or leave, the first one that has a batch.
    :param calls: How often it is seen in one forward pass (more than once when weights are shared).
    :param shape: Shape for one sample, without the batch dimension.
    :param size: ``N_i``, the number of elements for one sample over all `calls`.
    :param batch_dim: Which dimension is the batch. It may be a multiple of the batch (windows, time steps).
    :param rows: How many entries a sample has along it, call by call.
    :param interleaved: Whether those of a sample are as far apart as there are samples (time steps before the batch),
           not one after the other (windows).
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
        Bring a tensor that is seen here into an order that does not depend on the network.

        :param tensor: The tensor, as it enters or leaves.
        :param call: In which of the calls of a forward pass, counted from 0.
        :return: A view of it, shape (batch, ...); where a sample has several entries (batch, rows, ...).
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
    :param modules: The weighted module, then the norms that consume its output; or the modules of the block.
    :param output: Where the layer's feature ``F_i(x)`` is seen.
    :param input: Where the tensor that enters the layer is seen; `None` if nothing with a batch does.
    :param extra_parameters: Parameters that belong to the layer and to none of `modules`.
    :param is_head: Whether the layer gives the class scores.
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
        """
        Return the layer's parameters, those of its norm included.

        :return: Each parameter once.
        """
        in_modules = [parameter for module in self.modules for parameter in module.parameters()]
        return list(dict.fromkeys([*in_modules, *self.extra_parameters]))

    @property
    def nb_parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(p.numel() for p in self.parameters())
