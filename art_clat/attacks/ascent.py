"""
Projected gradient ascent on any objective.

The arithmetic of a step is that of ART's own projected gradient descent, so that the same attack gives the same
adversarial examples; it only leaves out what ART computes and throws away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from art_clat.attacks.balls import Ball, norms_of, scaled
from art_clat.utils.processes import Part

#: The least number of samples that an attack works on at once on a CPU, and how many elements they may have before it
#: takes no more. The activations of so many stay in the caches: 32 images of 3×32×32, or a whole batch of small ones.
CHUNK = 32


CHUNK_ELEMENTS = CHUNK * 3 * 32 * 32


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """
    How an attack climbs inside its ball.

    :param ball: Where.
    :param step: Step size, in units of the input.
    :param nb_steps: Number of steps.
    :param random_start: Start from a random point of the ball, not from the input.
    :param decay: Decay of the accumulated gradient (momentum), or `None`.
    """

    ball: Ball
    step: float | torch.Tensor
    nb_steps: int
    random_start: bool
    decay: float | None = None

    def start(self, x: torch.Tensor, part: Part) -> torch.Tensor:
        """
        Give the points to climb from.

        :param x: Inputs, shape (batch, ...).
        :param part: Which of the whole batch they are. Whatever the part, the random numbers drawn are those of the
               whole batch, so that a sample starts where it would if one process had them all.
        :return: Same shape as `x`.
        """
        if not self.random_start:
            return x
        whole = x.new_empty(()).expand(part.total, *x.shape[1:])  # however `x` is stored
        return self.ball.clip(x + self.ball.sample(whole)[part.mine])

    def __call__(
        self, objective: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        """
        Ascend an objective from every input of a batch (Madry et al., arXiv 1706.06083).

        :param objective: Gives one value a sample, or their sum or mean, for a perturbed batch.
        :param x: Inputs, shape (batch, ...), the centres of the balls.
        :param start: Where to climb from, same shape.
        :return: Perturbed inputs, same shape, detached.
        """
        ball = self.ball
        x_adv = start.clone()
        velocity = torch.zeros_like(x) if self.decay is not None else None
        for _ in range(self.nb_steps):
            with torch.enable_grad():
                x_adv.requires_grad_(True)
                (gradient,) = torch.autograd.grad(objective(x_adv).sum(), x_adv)
            with torch.no_grad():
                gradient = torch.where(gradient.isnan(), torch.zeros_like(gradient), gradient)  # as ART does
                if velocity is not None and self.decay is not None:
                    velocity = self.decay * velocity + scaled(gradient, 1 / norms_of(gradient, 1))
                    gradient = velocity
                stepped = ball.clip(x_adv + self.step * ball.steepest(gradient))
                x_adv = x + ball.project(stepped - x)
        return x_adv.detach()

    def single_step(self) -> Ascent:
        """
        Give the single-step form: one step of size ε from a random start, as in "CLAT (fast)".

        :return: The same ball, one step.
        """
        return replace(self, step=self.ball.eps, nb_steps=1, random_start=True, decay=None)


def in_chunks(function: Callable[..., torch.Tensor], *tensors: torch.Tensor, copies: int = 1) -> torch.Tensor:
    """
    Apply a function that treats samples one by one, on a CPU to as many at once as its caches hold.

    :param function: Takes the tensors, or the same chunk of each, and gives a tensor with as many rows.
    :param tensors: First dimensions equal; the first one are inputs.
    :param copies: How many inputs the function makes of each and passes through the network together.
    :return: What the function gives for all.
    """
    x = tensors[0]
    size = max(CHUNK, CHUNK_ELEMENTS // max(1, x[:1].numel())) // copies
    if x.device.type != "cpu" or len(x) <= size:
        return function(*tensors)
    return torch.cat([function(*chunk) for chunk in zip(*(t.split(size) for t in tensors), strict=True)])
