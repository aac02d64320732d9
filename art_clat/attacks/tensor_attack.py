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
    An ART attack on a classifier's output, in tensors. Its ball and steps can also climb other losses.

    ``ProjectedGradientDescent`` (its PyTorch class and ART's subclasses too, such as ``BasicIterativeMethod``) and
    ``FastGradientMethod`` run on the device, with ART's arithmetic. All other attacks run through their ``generate``,
    and so do options that this class does not implement: ``random_eps``, ``minimal``, another norm.

    :param attack: The attack, bound to the classifier's estimator.
    :param classifier: The classifier to attack.
    """

    def __init__(self, attack: EvasionAttack, classifier: TensorClassifier) -> None:
        self.attack = attack
        self.classifier = classifier

    @property
    def ascent(self) -> Ascent | None:
        """The attack's ball and steps with its current settings; `None` if the attack runs through ``generate``."""
        return _read_ascent(self.attack, self.classifier) if self.classifier.is_differentiable else None

    @property
    def why_generate(self) -> str | None:
        """Why the attack runs through its ``generate``; `None` if it does not."""
        if not self.classifier.is_differentiable:
            return "the classifier's preprocessing is not PyTorch's"
        return _why_generate(self.attack, self.classifier)

    @property
    def eps(self) -> float | torch.Tensor:
        """
        The radius of the attack's ball, in units of the input.

        :raises ValueError: If the attack runs through ``generate``.
        """
        return self._required_ascent.ball.eps

    def __call__(self, batch: Batch) -> torch.Tensor:
        """
        Perturb a batch so that the classifier's loss on its labels grows. The network runs in evaluation mode.

        :param batch: Inputs, with the labels to attack.
        :return: Adversarial examples, shape of ``batch.x``.
        """
        ascent = self.ascent
        with self.classifier.attacked():
            if ascent is None:
                return self._generate(batch)
            x_adv = climb_in_chunks(ascent, self._output_loss, batch, ascent.start(batch.x, batch.part))
            for _ in range(self.attack.num_random_init - 1):
                again = climb_in_chunks(ascent, self._output_loss, batch, ascent.start(batch.x, batch.part))
                fooled = self._fooled(again, batch.y).view(-1, *[1] * (again.ndim - 1))
                x_adv = torch.where(fooled, again, x_adv)
        return x_adv

    def start(self, batch: Batch) -> torch.Tensor:
        """
        Choose the points that the attack starts from: the inputs, or random points of their balls.

        :param batch: The inputs, the centres of the balls.
        :return: Shape of ``batch.x``.
        :raises ValueError: If the attack runs through ``generate``.
        """
        return self._required_ascent.start(batch.x, batch.part)

    def random_start(self, batch: Batch) -> torch.Tensor:
        """
        Draw a random point of each input's ball, even if the attack starts from the input.

        :param batch: The inputs, the centres of the balls.
        :return: Shape of ``batch.x``.
        :raises ValueError: If the attack runs through ``generate``.
        """
        return replace(self._required_ascent, random_start=True).start(batch.x, batch.part)

    def start_near(self, batch: Batch, deviation: float) -> torch.Tensor:
        """
        Add normally distributed noise to each input.

        :param batch: The inputs.
        :param deviation: Standard deviation of the noise, in units of the input.
        :return: Shape of ``batch.x``.
        :raises ValueError: If the attack runs through ``generate``.
        """
        x, part = batch.x, batch.part
        noise = torch.randn((part.total, *x.shape[1:]), device=x.device, dtype=x.dtype)[part.mine]
        return self._required_ascent.ball.clip(x + deviation * noise)

    def climb(
        self, loss_on: Callable[[Batch], Loss], batch: Batch, *, start: torch.Tensor, single_step: bool = False
    ) -> torch.Tensor:
        """
        Climb another loss with the attack's ball and steps, without momentum. The network runs in evaluation mode.

        :param loss_on: A function of a batch of clean samples that returns the loss to climb, a function of perturbed
               inputs.
        :param batch: The clean samples, the centres of the balls.
        :param start: Points to climb from, shape of ``batch.x``.
        :param single_step: Make one step of size ε instead of the attack's steps.
        :return: Perturbed inputs, shape of ``batch.x``, detached.
        :raises ValueError: If the attack runs through ``generate``.
        """
        ascent = self._required_ascent.single_step() if single_step else replace(self._required_ascent, decay=None)
        with self.classifier.attacked():
            return climb_in_chunks(ascent, loss_on, batch, start)

    def in_few_steps(self, batch: Batch, nb_steps: int, *, reach: float) -> torch.Tensor:
        """
        Attack the output within the attack's ball, from a random start, in steps of another number and size.

        :param batch: Inputs, with the labels to attack.
        :param nb_steps: Number of steps, at least 1.
        :param reach: Their summed length, in units of ε.
        :return: Adversarial examples, shape of ``batch.x``.
        :raises ValueError: If the attack runs through ``generate``.
        """
        ascent = self._required_ascent
        step = reach * ascent.ball.eps / nb_steps
        ascent = replace(ascent, step=step, nb_steps=nb_steps, random_start=True, decay=None)
        with self.classifier.attacked():
            return climb_in_chunks(ascent, self._output_loss, batch, ascent.start(batch.x, batch.part))

    def go_on(
        self,
        loss_on: Callable[[Batch], Loss],
        batch: Batch,
        delta: torch.Tensor,
        *,
        nb_steps: int,
        step: float | torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Climb a loss from earlier perturbations, which are brought into the ball first.

        :param loss_on: As in :meth:`climb`.
        :param batch: The clean samples, the centres of the balls.
        :param delta: The earlier perturbations, shape of ``batch.x``.
        :param nb_steps: Number of steps.
        :param step: Their size, in units of the input; `None` for ε/2.
        :return: Perturbed inputs, shape of ``batch.x``, detached.
        :raises ValueError: If the attack runs through ``generate``.
        """
        ascent = self._required_ascent.continued(nb_steps, step)
        start = ascent.ball.clip(batch.x + ascent.ball.project(delta))
        with self.classifier.attacked():
            return climb_in_chunks(ascent, loss_on, batch, start)

    def _output_loss(self, batch: Batch) -> Loss:
        return self.classifier.loss_on(batch.y)

    @property
    def _required_ascent(self) -> Ascent:
        ascent = self.ascent
        if ascent is None:
            raise ValueError(
                f"{type(self.attack).__name__} runs through its `generate`, which cannot climb another loss: "
                f"{self.why_generate}."
            )
        return ascent

    def _fooled(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.classifier.logits(x).argmax(dim=1) != self.classifier.one_hot(y).argmax(dim=1)

    def _generate(self, batch: Batch) -> torch.Tensor:
        with _quiet(self.attack):
            labels = self.classifier.one_hot(batch.y).cpu().numpy()
            arrays = self.attack.generate(batch.x.cpu().numpy(), y=labels)
        return torch.as_tensor(np.asarray(arrays, np.float32), device=batch.x.device)


BALLS: dict[float, type[LinfBall | L2Ball | L1Ball]] = {np.inf: LinfBall, 2.0: L2Ball, 1.0: L1Ball}


def _why_generate(attack: EvasionAttack, classifier: TensorClassifier) -> str | None:
    """Return why the steps of an ART attack are not known here; `None` if they are."""
    name = type(attack).__name__
    is_fgm = type(attack) is FastGradientMethod
    if not (is_fgm or isinstance(attack, (ProjectedGradientDescent, ProjectedGradientDescentPyTorch))):
        return f"{name} is not of the PGD family"
    if type(attack).__module__.split(".")[0] != "art":
        return f"{name} is a subclass from elsewhere, which may override anything"
    if classifier.estimator.is_rnn:
        return "the network is recurrent"
    if attack.estimator is not classifier.estimator:
        return f"{name} has a classifier of its own, with another loss or other clip values"
    for option in ("random_eps", "minimal"):
        if getattr(attack, option, False):
            return f"{name} has `{option}=True`"
    if is_fgm and attack.num_random_init > 1:
        return f"{name} has `num_random_init` above 1"
    if float(attack.norm) not in BALLS:
        return f"its norm is {attack.norm}, not inf, 2 or 1"
    if np.ndim(attack.eps) > 0 and float(attack.norm) != np.inf:
        return "it has an `eps` for each element in another norm than inf"
    return None


def _read_ascent(attack: EvasionAttack, classifier: TensorClassifier) -> Ascent | None:
    """Read an ART attack's ball and steps; `None` if it must run through its ``generate``."""
    if _why_generate(attack, classifier) is not None:
        return None
    is_pgd, ball = type(attack) is not FastGradientMethod, BALLS[float(attack.norm)]

    def in_float32(value: object) -> float | torch.Tensor:
        array = np.asarray(value, np.float32)
        return torch.as_tensor(array, device=classifier.device) if array.ndim else float(array)

    eps = in_float32(attack.eps)
    return Ascent(
        ball=ball(eps, classifier.clip_values),
        step=in_float32(attack.eps_step) if is_pgd else eps,
        nb_steps=int(attack.max_iter) if is_pgd else 1,
        random_start=attack.num_random_init > 0,
        # ProjectedGradientDescent itself has no `decay`; the attack that it wraps has.
        decay=getattr(attack, "_attack", attack).decay if is_pgd else None,
    )


@contextmanager
def _quiet(attack: EvasionAttack) -> Iterator[None]:
    """Turn off an attack's progress bar, which would appear once a batch."""
    if "verbose" not in attack.attack_params:
        yield
        return
    verbose = attack.verbose
    attack.set_params(verbose=False)
    try:
        yield
    finally:
        attack.set_params(verbose=verbose)
