"""
Projected gradient ascent on any loss.

A step does the same arithmetic as ART's projected gradient descent, so the same attack makes the same adversarial
examples. Only what ART computes and throws away is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from art_clat.attacks.balls import Ball, norms_of, scaled
from art_clat.utils.batch import Batch
from art_clat.utils.processes import Part

#: What an attack climbs: a function of a perturbed batch that returns one value a sample, or their sum or mean.
Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """
    How an attack climbs inside its ball (Madry et al., arXiv 1706.06083).

    :param ball: The perturbations to choose from.
    :param step: Step size, in units of the input.
    :param nb_steps: Number of steps.
    :param random_start: Start from a random point of the ball instead of the input.
    :param decay: Decay of the accumulated gradient (momentum); `None` for no momentum.
    """

    ball: Ball
    step: float | torch.Tensor
    nb_steps: int
    random_start: bool
    decay: float | None = None

    def start(self, x: torch.Tensor, part: Part) -> torch.Tensor:
        """
        Choose the points to climb from, shape of `x`.

        Every process draws the random numbers of the whole batch, so a sample starts where it would in a single
        process.
        """
        if not self.random_start:
            return x
        whole = x.new_empty(()).expand(part.total, *x.shape[1:])  # whatever the memory format of `x`
        return self.ball.clip(x + self.ball.sample(whole)[part.mine])

    def __call__(self, loss: Loss, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Climb a loss from `start` within the balls around `x`; return the perturbed inputs, detached."""
        x_adv = start.clone()
        velocity = torch.zeros_like(x) if self.decay is not None else None
        for _ in range(self.nb_steps):
            with torch.enable_grad():
                x_adv.requires_grad_(True)
                (gradient,) = torch.autograd.grad(loss(x_adv).sum(), x_adv)
            with torch.no_grad():
                gradient = torch.where(gradient.isnan(), torch.zeros_like(gradient), gradient)  # as ART does
                if velocity is not None and self.decay is not None:
                    velocity = self.decay * velocity + scaled(gradient, 1 / norms_of(gradient, 1))
                    gradient = velocity
                stepped = self.ball.clip(x_adv + self.step * self.ball.steepest(gradient))
                x_adv = x + self.ball.project(stepped - x)
        return x_adv.detach()

    def single_step(self) -> Ascent:
        """Return the single-step form: one step of size ε from a random start, as in "CLAT (fast)"."""
        return replace(self, step=self.ball.eps, nb_steps=1, random_start=True, decay=None)

    def continued(self, nb_steps: int, step: float | torch.Tensor | None) -> Ascent:
        """Return the form that goes on from an earlier perturbation, with steps of size ε/2 if `step` is `None`."""
        step_size = self.ball.eps / 2 if step is None else step
        return replace(self, step=step_size, nb_steps=nb_steps, random_start=False, decay=None)


def climb_in_chunks(
    ascent: Ascent, loss_on: Callable[[Batch], Loss], batch: Batch, start: torch.Tensor
) -> torch.Tensor:
    """Climb from every input of a batch, on a CPU in chunks that fit its caches; `loss_on` makes a chunk's loss."""
    chunks = batch.chunks()
    starts = start.split([len(chunk) for chunk in chunks])
    found = [ascent(loss_on(chunk), chunk.x, begin) for chunk, begin in zip(chunks, starts, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)
