"""An ART attack on a network's output, in tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent, ProjectedGradientDescentPyTorch

from art_clat.attacks.ascent import Ascent, in_chunks
from art_clat.attacks.balls import L1Ball, L2Ball, LinfBall
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.utils.processes import Part


class TensorAttack:
    """
    An ART attack on the network's output, in tensors.

    ``ProjectedGradientDescent`` (also its PyTorch class and its subclasses such as ``BasicIterativeMethod``) and
    ``FastGradientMethod`` run on the device, with ART's arithmetic. Any other attack, and options of these with no
    meaning for a batch (``random_eps``, ``minimal``, another norm), go through ART's own ``generate``.

    :param attack: The attack, on the network's classifier.
    :param network: The network.
    """

    def __init__(self, attack: EvasionAttack, network: TensorClassifier) -> None:
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


def _ascent(attack: EvasionAttack, network: TensorClassifier) -> Ascent | None:
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
