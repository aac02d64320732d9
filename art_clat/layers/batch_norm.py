"""A faster BatchNorm if it is frozen; one over all processes if it is trained on several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from art_clat.utils.processes import Ranks

#: The constants that multiply a gradient, by running variance, weight, ε and number of dimensions.
Factors = dict[tuple[torch.Tensor, "torch.Tensor | None", float, int], list[torch.Tensor]]


class BatchNorms(TorchFunctionMode):
    """
    Computes every ``batch_norm`` of the forward passes in this context; modules are not changed.

    A frozen BatchNorm on its stored statistics scales each channel by a constant. torch's backward pass would still
    read the input again and sum over the batch for gradients that nobody needs. Here it is one multiplication, which on
    a CPU gives the same bits. A BatchNorm that trains on several processes takes its statistics over the whole batch,
    as one process would.

    :param ranks: The processes that share the batch of a forward pass; one alone for passes that are not shared.
    :param factors: Where to keep the constants between forward passes; pass it only while weights and statistics do not
           change. `None` computes them in every pass.
    """

    def __init__(self, ranks: Ranks, factors: Factors | None = None) -> None:
        super().__init__()
        self.ranks = ranks
        self.factors = factors

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            return self._batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _batch_norm(
        self,
        x: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        if training and self.ranks.size > 1:
            return self._over_all_ranks(x, running_mean, running_var, weight, bias, momentum, eps)
        frozen = not any(p is not None and p.requires_grad for p in (weight, bias))
        if not training and frozen and x.requires_grad and running_var is not None:
            factors = self._factors(running_var, weight, eps, x.ndim)
            y: torch.Tensor = _FrozenBatchNorm.apply(x, factors, running_mean, running_var, weight, bias, eps)
            return y
        return functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    def _factors(
        self, running_var: torch.Tensor, weight: torch.Tensor | None, eps: float, ndim: int
    ) -> list[torch.Tensor]:
        """Return the constants that multiply the gradient: in double precision, and in torch's order on a CPU."""
        key = (running_var, weight, eps, ndim)
        if self.factors is not None and key in self.factors:
            return self.factors[key]
        scale = (1 / torch.sqrt(running_var.double() + eps)).to(running_var.dtype)
        factors = [_channels(factor, ndim) for factor in (scale, weight) if factor is not None]
        if self.factors is not None:
            self.factors[key] = factors
        return factors

    def _over_all_ranks(
        self,
        x: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        dims = [0, *range(2, x.ndim)]
        wide = x.float()
        here = wide.new_full((1,), x.numel() // x.shape[1])
        *_, count = sums = self.ranks.sum(torch.cat([wide.sum(dims), here]))
        mean = sums[:-1] / count
        centred = wide - _channels(mean, x.ndim)
        variance = self.ranks.sum(centred.square().sum(dims)) / count
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                unbiased = variance * (count / (count - 1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        scale = torch.rsqrt(variance + eps)
        y = centred * _channels(scale if weight is None else scale * weight, x.ndim)
        return (y if bias is None else y + _channels(bias, x.ndim)).to(x.dtype)


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        factors: list[torch.Tensor],
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        ctx.factors = factors
        return functional.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first, *others = (factor.to(gradient.dtype) for factor in ctx.factors)
        scaled = gradient * first
        for factor in others:
            scaled *= factor
        return scaled, None, None, None, None, None, None


def _channels(values: torch.Tensor, ndim: int) -> torch.Tensor:
    """Shape one value a channel so that it broadcasts over a batch of `ndim` dimensions."""
    return values.view(1, -1, *[1] * (ndim - 2))
