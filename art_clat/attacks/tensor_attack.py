"""An ART attack on a network's output, in tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent, ProjectedGradientDescentPyTorch

from art_clat.attacks.ascent import Ascent, Loss, climb_in_chunks
from art_clat.attacks.balls import L1Ball, L2Ball, LinfBall
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.utils.batch import Batch


class TensorAttack:
    """
    An ART attack on a classifier's output, in tensors; its ball and steps also serve other losses.

    ``ProjectedGradientDescent`` (also its PyTorch class and its subclasses such as ``BasicIterativeMethod``) and
    ``FastGradientMethod`` run on the device, with ART's arithmetic. Any other attack, and options of these with no
    meaning for a batch (``random_eps``, ``minimal``, another norm), go through ART's own ``generate``.

    :param attack: The attack, bound to the classifier's estimator.
    :param classifier: What it attacks.
    """

    def __init__(self, attack: EvasionAttack, classifier: TensorClassifier) -> None:
        self.attack = attack
        self.classifier = classifier

    @property
    def ascent(self) -> Ascent | None:
        """The attack's ball and steps, as they are now; `None` if the attack runs through ``generate``."""
        return _read_ascent(self.attack, self.classifier) if self.classifier.is_differentiable else None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """
        Perturb a batch so that the classifier's loss on its labels grows. The network runs in evaluation mode.

        :param batch: The batch.
        :return: Adversarial examples, shape of ``batch.x``.
        """
        ascent = self.ascent
        with self.classifier.attacked():
            if ascent is None:
                return self._generate(batch)
            x_adv = climb_in_chunks(ascent, self._own_loss, batch, ascent.start(batch.x, batch.part))
            for _ in range(self.attack.num_random_init - 1):
                again = climb_in_chunks(ascent, self._own_loss, batch, ascent.start(batch.x, batch.part))
                fooled = self._fooled(again, batch.y).view(-1, *[1] * (again.ndim - 1))
                x_adv = torch.where(fooled, again, x_adv)
        return x_adv

    def start(self, batch: Batch) -> torch.Tensor:
        """
        Choose where the attack itself begins.

        :param batch: The batch.
        :return: Shape of ``batch.x``.
        """
        return self._own_ascent.start(batch.x, batch.part)

    def random_start(self, batch: Batch) -> torch.Tensor:
        """
        Draw a random point of each input's ball, whether or not the attack itself begins there.

        :param batch: The batch.
        :return: Shape of ``batch.x``.
        """
        return replace(self._own_ascent, random_start=True).start(batch.x, batch.part)

    def start_near(self, batch: Batch, deviation: float) -> torch.Tensor:
        """
        Draw a point close to each input, from a normal distribution.

        :param batch: The batch.
        :param deviation: Its standard deviation, in units of the input.
        :return: Shape of ``batch.x``.
        """
        x, part = batch.x, batch.part
        noise = torch.randn((part.total, *x.shape[1:]), device=x.device, dtype=x.dtype)[part.mine]
        return self._own_ascent.ball.clip(x + deviation * noise)

    def climb(
        self, loss_on: Callable[[Batch], Loss], batch: Batch, *, start: torch.Tensor, single_step: bool = False
    ) -> torch.Tensor:
        """
        Climb another loss in the attack's ball with its steps, without momentum. The network runs in evaluation mode.

        :param loss_on: Takes a batch, the centres of the balls; returns the loss to climb, a function of a perturbed
               batch.
        :param batch: The batch.
        :param start: Where to climb from, shape of ``batch.x``.
        :param single_step: Make one step of size ε instead.
        :return: Perturbed inputs, same shape, detached.
        """
        ascent = self._own_ascent.single_step() if single_step else replace(self._own_ascent, decay=None)
        with self.classifier.attacked():
            return climb_in_chunks(ascent, loss_on, batch, start)

    def _own_loss(self, batch: Batch) -> Loss:
        return self.classifier.loss_on(batch.y)

    @property
    def _own_ascent(self) -> Ascent:
        ascent = self.ascent
        if ascent is None:
            raise ValueError(f"{type(self.attack).__name__} runs through `generate`: it has no steps for another loss.")
        return ascent

    def _fooled(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.classifier.logits(x).argmax(dim=1) != self.classifier.one_hot(y).argmax(dim=1)

    def _generate(self, batch: Batch) -> torch.Tensor:
        with _quiet(self.attack):
            labels = self.classifier.one_hot(batch.y).cpu().numpy()
            arrays = self.attack.generate(batch.x.cpu().numpy(), y=labels)
        return torch.as_tensor(np.asarray(arrays, np.float32), device=batch.x.device)


def _read_ascent(attack: EvasionAttack, classifier: TensorClassifier) -> Ascent | None:
    """Read an ART attack's ball and steps; `None` if it is not one this module runs itself."""
    is_pgd = isinstance(attack, (ProjectedGradientDescent, ProjectedGradientDescentPyTorch))
    is_fgm = type(attack) is FastGradientMethod
    # A user's subclass may do anything in its `generate`.
    is_arts_own = type(attack).__module__.split(".")[0] == "art"
    if not (is_pgd or is_fgm) or not is_arts_own or classifier.estimator.is_rnn:
        return None
    if attack.estimator is not classifier.estimator:  # another loss, other clip values
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
        return torch.as_tensor(array, device=classifier.device) if array.ndim else float(array)

    eps = in_float32(attack.eps)
    return Ascent(
        ball=ball(eps, classifier.clip_values),
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
