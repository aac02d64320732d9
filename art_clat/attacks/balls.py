"""The perturbations that an attack may choose from."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ball(abc.ABC):
    """
    The perturbations that an attack may choose from: a norm ball around the input, cut to the range of valid inputs.

    :param eps: Radius, in units of the input; for ℓ∞ also a tensor that broadcasts to an input.
    :param clip_values: Smallest and largest valid input, or `None`.
    """

    eps: float | torch.Tensor
    clip_values: tuple[torch.Tensor, ...] | None

    @abc.abstractmethod
    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the direction of steepest ascent for every sample, of norm one."""

    @abc.abstractmethod
    def project(self, delta: torch.Tensor) -> torch.Tensor:
        """Bring perturbations into the ball as ART does: finite norms by scaling."""

    @abc.abstractmethod
    def sample(self, x: torch.Tensor) -> torch.Tensor:
        """Draw perturbations uniformly from the ball; only the shape, type and device of `x` are used."""

    def clip(self, x: torch.Tensor) -> torch.Tensor:
        """Cut inputs to the valid range."""
        return x if self.clip_values is None else torch.clamp(x, *self.clip_values)


class LinfBall(Ball):
    """The perturbations whose every component is at most ε."""

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.sign()

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        return torch.clamp(delta, -self.eps, self.eps)  # type: ignore[arg-type]  # numbers or tensors

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * torch.rand_like(x) - 1) * self.eps


class L2Ball(Ball):
    """The perturbations of Euclidean length at most ε."""

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        return scaled(gradient, 1 / norms_of(gradient, 2))

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        return scaled(delta, torch.clamp(self.eps / norms_of(delta, 2), max=1))

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        direction = self.steepest(torch.randn_like(x))
        radius = torch.rand(len(x), device=x.device) ** (1 / x[0].numel())
        return scaled(direction, self.eps * radius)


class L1Ball(Ball):
    """The perturbations whose absolute components sum to at most ε."""

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        flat = gradient.flatten(1)
        largest = flat.abs().argmax(dim=1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest).sign()).view_as(gradient)

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        return scaled(delta, torch.clamp(self.eps / norms_of(delta, 1), max=1))

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        # Of d + 1 spacings of a Poisson process, divided by their sum, the first d are uniform in the solid simplex.
        spacings = torch.empty(len(x), x[0].numel() + 1, device=x.device, dtype=x.dtype).exponential_()
        sizes = spacings[:, :-1] / spacings.sum(dim=1, keepdim=True)
        signs = torch.randint(0, 2, sizes.shape, device=x.device) * 2 - 1
        return (sizes * signs * self.eps).view_as(x)


def norms_of(x: torch.Tensor, order: int) -> torch.Tensor:
    """Return the norm of every sample, shape (batch,)."""
    norms: torch.Tensor = torch.linalg.vector_norm(x.flatten(1), ord=order, dim=1)
    return norms


def scaled(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Scale every sample by its factor; an infinite factor, of a sample whose norm is zero, makes it zero."""
    factors = torch.where(torch.isinf(factors), torch.zeros_like(factors), factors)
    return x * factors.view(-1, *[1] * (x.ndim - 1))
