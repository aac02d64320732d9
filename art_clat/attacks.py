"""Projected gradient ascent on any objective, in the ball an ART attack describes.

An attack is an objective plus a ball. The arithmetic of a step is that of ART's own projected gradient descent, so
that the same attack gives the same adversarial examples; it only leaves out what ART computes and throws away.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent, ProjectedGradientDescentPyTorch

from art_clat.distributed import Part
from art_clat.network import Network

#: The least number of samples that an attack works on at once on a CPU, and how many elements they may have before it
#: takes no more. The activations of so many stay in the caches: 32 images of 3×32×32, or a whole batch of small ones.
CHUNK = 32
CHUNK_ELEMENTS = CHUNK * 3 * 32 * 32


@dataclass(frozen=True)
class Ball(abc.ABC):
    """
    The perturbations an attack may choose from: a norm ball around the input, cut by the range of valid inputs.

    :param eps: Radius, in units of the input; for ℓ∞ also a tensor broadcastable to an input.
    :param clip_values: Smallest and largest valid input, or `None`.
    """

    eps: float | torch.Tensor
    clip_values: tuple[torch.Tensor, ...] | None

    @abc.abstractmethod
    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        """
        Give the direction of steepest ascent of norm one, for every sample.

        :param gradient: Shape (batch, ...).
        :return: Same shape.
        """

    @abc.abstractmethod
    def project(self, delta: torch.Tensor) -> torch.Tensor:
        """
        Bring perturbations into the ball, as ART does (finite norms: by scaling).

        :param delta: Shape (batch, ...).
        :return: Same shape.
        """

    @abc.abstractmethod
    def sample(self, x: torch.Tensor) -> torch.Tensor:
        """
        Draw perturbations uniformly from the ball.

        :param x: Inputs, for their shape, type and device; never read.
        :return: Same shape as `x`.
        """

    def clip(self, x: torch.Tensor) -> torch.Tensor:
        """
        Cut inputs to the valid range.

        :param x: Shape (batch, ...).
        :return: Same shape.
        """
        return x if self.clip_values is None else torch.clamp(x, *self.clip_values)


class LinfBall(Ball):
    """Every component within ε."""

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.sign()

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        return torch.clamp(delta, -self.eps, self.eps)  # type: ignore[arg-type]  # numbers or tensors

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * torch.rand_like(x) - 1) * self.eps


class L2Ball(Ball):
    """Euclidean length within ε."""

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        return _scaled(gradient, 1 / _norms(gradient, 2))

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        return _scaled(delta, torch.clamp(self.eps / _norms(delta, 2), max=1))

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        direction = self.steepest(torch.randn_like(x))
        radius = torch.rand(len(x), device=x.device) ** (1 / x[0].numel())
        return _scaled(direction, self.eps * radius)


class L1Ball(Ball):
    """Sum of absolute components within ε."""

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        flat = gradient.flatten(1)
        largest = flat.abs().argmax(dim=1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest).sign()).view_as(gradient)

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        return _scaled(delta, torch.clamp(self.eps / _norms(delta, 1), max=1))

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        # Spacings of a Poisson process: all but the last of d + 1 are uniform in the solid simplex.
        spacings = torch.empty(len(x), x[0].numel() + 1, device=x.device, dtype=x.dtype).exponential_()
        sizes = spacings[:, :-1] / spacings.sum(dim=1, keepdim=True)
        signs = torch.randint(0, 2, sizes.shape, device=x.device) * 2 - 1
        return (sizes * signs * self.eps).view_as(x)


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
                    velocity = self.decay * velocity + _scaled(gradient, 1 / _norms(gradient, 1))
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


class OutputAttack:
    """
    An ART attack on the network's output, in tensors.

    ``ProjectedGradientDescent`` (also its PyTorch class and its subclasses such as ``BasicIterativeMethod``) and
    ``FastGradientMethod`` run on the device, with ART's arithmetic. Any other attack, and options of these with no
    meaning for a batch (``random_eps``, ``minimal``, another norm), go through ART's own ``generate``.

    :param attack: The attack, on the network's classifier.
    :param network: The network.
    """

    def __init__(self, attack: EvasionAttack, network: Network) -> None:
        self.attack = attack
        self.network = network

    @property
    def ascent(self) -> Ascent | None:
        """The attack's ball and steps, as they are now; `None` where the attack runs through ``generate``."""
        return _ascent(self.attack, self.network) if self.network.is_differentiable else None

    def __call__(self, x: torch.Tensor, y: torch.Tensor, part: Part | None = None) -> torch.Tensor:
        """
        Perturb a batch so that the classifier's loss on its labels grows. The network runs in evaluation mode.

        :param x: Inputs, shape (batch, *input_shape).
        :param y: Index labels, shape (batch,), or class probabilities, shape (batch, nb_classes).
        :param part: Which of a larger batch these are; `None` for all of it.
        :return: Adversarial examples, same shape as `x`.
        """
        ascent = self.ascent
        with self.network.attacked():
            if ascent is None:
                return self._generate(x, y)

            def climb() -> torch.Tensor:
                start = ascent.start(x, part or Part(len(x)))
                return in_chunks(lambda x, y, start: ascent(self.network.loss_on(y), x, start), x, y, start)

            x_adv = climb()
            for _ in range(self.attack.num_random_init - 1):
                again = climb()
                fooled = self._fooled(again, y).view(-1, *[1] * (x.ndim - 1))
                x_adv = torch.where(fooled, again, x_adv)
        return x_adv

    def _fooled(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.network.logits(x).argmax(dim=1) != self.network.one_hot(y).argmax(dim=1)

    def _generate(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with _quiet(self.attack):
            arrays = self.attack.generate(x.cpu().numpy(), y=self.network.one_hot(y).cpu().numpy())
        return torch.as_tensor(np.asarray(arrays, np.float32), device=x.device)


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


def _ascent(attack: EvasionAttack, network: Network) -> Ascent | None:
    """Read an ART attack's ball and steps; `None` where it is not one this module runs itself."""
    is_pgd = isinstance(attack, (ProjectedGradientDescent, ProjectedGradientDescentPyTorch))
    is_fgm = type(attack) is FastGradientMethod
    # A user's subclass may do anything in its `generate`.
    is_arts_own = type(attack).__module__.split(".")[0] == "art"
    if not (is_pgd or is_fgm) or not is_arts_own or network.classifier.is_rnn:
        return None
    if attack.estimator is not network.classifier:  # another loss, other clip values
        return None
    if getattr(attack, "random_eps", False) or getattr(attack, "minimal", False):
        return None
    if is_fgm and attack.num_random_init > 1:
        return None
    balls: dict[float, type[LinfBall | L2Ball | L1Ball]] = {np.inf: LinfBall, 2.0: L2Ball, 1.0: L1Ball}
    ball = balls.get(float(attack.norm))
    if ball is None or (np.ndim(attack.eps) > 0 and ball is not LinfBall):
        return None

    def in_float32(value: object) -> float | torch.Tensor:
        array = np.asarray(value, np.float32)
        return torch.as_tensor(array, device=network.device) if array.ndim else float(array)

    eps = in_float32(attack.eps)
    return Ascent(
        ball=ball(eps, network.clip_values),
        step=in_float32(attack.eps_step) if is_pgd else eps,
        nb_steps=int(attack.max_iter) if is_pgd else 1,
        random_start=attack.num_random_init > 0,
        # ART keeps the decay of ProjectedGradientDescent in the attack it wraps only.
        decay=getattr(attack, "_attack", attack).decay if is_pgd else None,
    )


@contextmanager
def _quiet(attack: EvasionAttack) -> Iterator[None]:
    """Silence an attack's own progress bar, which would appear once a batch."""
    if "verbose" not in attack.attack_params:
        yield
        return
    verbose = attack.verbose
    attack.set_params(verbose=False)
    try:
        yield
    finally:
        attack.set_params(verbose=verbose)


def _norms(x: torch.Tensor, order: int) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(x.flatten(1), ord=order, dim=1)
    return norms


def _scaled(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Scale every sample by its own factor; a sample whose norm was zero (an infinite factor) stays as it is."""
    factors = torch.where(torch.isinf(factors), torch.zeros_like(factors), factors)
    return x * factors.view(-1, *[1] * (x.ndim - 1))
