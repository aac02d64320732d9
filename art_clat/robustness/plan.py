"""What an evaluation does: its attacks in their order, what each costs, and which examples it runs on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from art_clat.attacks.ascent import Ascent, Loss, climb_in_chunks
from art_clat.attacks.balls import L1Ball, L2Ball, LinfBall
from art_clat.robustness.autoattack import VERSIONS, Attack, Ensemble
from art_clat.robustness.target import Target
from art_clat.utils.batch import Batch
from art_clat.utils.checks import check_seed, check_whole

#: RobustBench's names of the norms, what users write for them, and the balls.
NORMS: dict[str, tuple[tuple[object, ...], type[LinfBall | L2Ball | L1Ball]]] = {
    "Linf": (("Linf", "linf", "inf", np.inf), LinfBall),
    "L2": (("L2", "l2", 2), L2Ball),
    "L1": (("L1", "l1", 1), L1Ball),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    The arguments of an evaluation that are numbers or names; two evaluations with other ones have other results.

    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    :param eps: Radius of the ball, in units of inputs in [0, 1].
    :param autoattack_version: ``"standard"``, ``"plus"``, ``"rand"``, ``"few-classes"``, or `None` to leave AutoAttack
           out.
    :param pgd_max_iter: Number of PGD steps, at least 1.
    :param pgd_eps_step: Size of a PGD step, positive.
    :param pgd_restarts: Number of random starts of PGD, at least 1.
    :param batch_size: Examples in a batch, at least 1.
    :param seed: 0 … 2**32 − 1.
    :raises ValueError: If one of them, except ε, is out of its range.
    """

    norm: str
    eps: float
    autoattack_version: str | None
    pgd_max_iter: int
    pgd_eps_step: float
    pgd_restarts: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for argument in ("pgd_max_iter", "pgd_restarts", "batch_size"):
            check_whole(getattr(self, argument), 1, argument=argument)
            object.__setattr__(self, argument, int(getattr(self, argument)))  # NumPy's numbers too
        if not self.pgd_eps_step > 0:
            raise ValueError(f"`pgd_eps_step` must be positive, got {self.pgd_eps_step}.")
        versions = (None, *VERSIONS)
        if self.autoattack_version not in versions:
            raise ValueError(f"`autoattack_version` must be one of {versions}, got {self.autoattack_version!r}.")
        check_seed(self.seed)
        object.__setattr__(self, "seed", int(self.seed))


@dataclass(frozen=True)
class Step:
    """
    One attack of an evaluation.

    :param name: Its name in reports and files, unique in the evaluation.
    :param attack: The attack; `None` for the examples as they are.
    :param cost: Forward passes that it takes for an example, at most; a backward pass counts for two.
    :param after: The step whose robust examples it runs on; `None` for all examples.
    :param of_autoattack: Whether it is one of AutoAttack's attacks.
    """

    name: str
    attack: Attack | None
    cost: float
    after: str | None
    of_autoattack: bool = False


def make_plan(target: Target, settings: Settings, *, source: Target | None, autoattack: Ensemble | None) -> list[Step]:
    """
    Plan an evaluation: clean accuracy, PGD, transfer and AutoAttack.

    PGD and transfer run on the examples that are classified correctly as they are. Each of AutoAttack's attacks runs on
    the examples that the one before has left.

    :param target: What is evaluated.
    :param settings: Where the norm, ε, and PGD's steps and restarts are taken from.
    :param source: Whose adversarial examples are tried on `target`; `None` for no transfer.
    :param autoattack: AutoAttack on `target`, or `None` to leave it out.
    :return: The steps, in their order.
    """
    steps, restarts = settings.pgd_max_iter, settings.pgd_restarts
    plan = [
        Step("clean", None, 1, after=None),
        Step("pgd", pgd(target, settings, nb_restarts=restarts), 3 * steps * restarts, after="clean"),
    ]
    if source is not None:
        plan.append(Step("transfer", pgd(source, settings, nb_restarts=1), 3 * steps, after="clean"))
    before = "clean"
    if autoattack is not None:
        for name in autoattack.names:
            cost = autoattack.forward_passes(name)
            plan.append(Step(name, autoattack.attack(name), cost, after=before, of_autoattack=True))
            before = name
    return plan


def pgd(target: Target, settings: Settings, *, nb_restarts: int) -> Attack:
    """Return projected gradient ascent on the cross-entropy, from random starts (Madry et al., arXiv 1706.06083)."""
    model, device = target.model, target.device
    bounds = torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)
    ball = NORMS[settings.norm][1](torch.tensor(settings.eps, device=device), bounds)
    step = torch.tensor(settings.pgd_eps_step, device=device)
    ascent = Ascent(ball=ball, step=step, nb_steps=settings.pgd_max_iter, random_start=True)

    def loss_on(batch: Batch) -> Loss:
        return lambda z: nn.functional.cross_entropy(model(z), batch.y, reduction="sum")

    def attack(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        back, x, y = x.device, x.to(device), y.to(device)
        x_adv, left = x.clone(), torch.arange(len(x), device=device)
        for _ in range(nb_restarts):
            if len(left):
                batch = Batch.whole(x[left], y[left])
                x_adv[left] = climb_in_chunks(ascent, loss_on, batch, ascent.start(batch.x, batch.part))
                left = left[model(x_adv[left]).argmax(dim=1) == y[left]]
        return x_adv.to(back)

    return attack


def norm_name(norm: object) -> str:
    """Return RobustBench's name of a norm; raise a `ValueError` for another one."""
    for name, (spellings, _) in NORMS.items():
        if norm in spellings:
            return name
    raise ValueError(f"`norm` must be 'Linf', 'L2' or 'L1' (or np.inf, 2, 1), got {norm!r}.")
