"""
Attacks that go on from where the last epoch's attack on the image ended.

ATTA does so for whole networks (Zheng et al., arXiv 1912.11969). Once most of a network is frozen, an image's
perturbation from the last epoch is still nearly the worst one, so one step from there is enough.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from art_clat.attacks.ascent import Ascent
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.config import ReuseOptions, TrainerOptions
from art_clat.training.augmentation import CropAndFlip, Moves
from art_clat.training.data import DEVICE_SHARE, ArrayBatches, Batches
from art_clat.training.keeper import Keeper
from art_clat.training.objectives import Objective, find_objective
from art_clat.training.perturbations import PerturbationFiles, Perturbations, place_for
from art_clat.utils.batch import Batch
from art_clat.utils.processes import Ranks

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Reuse:
    """
    The second stage's attacks: the full attack on an image that has no perturbation, a few steps on one that has.

    :param options: Number and size of the steps.
    :param kept: The perturbations, in the images' own frame.
    :param files: Saves them beside the checkpoint, or `None`.
    :param augmentation: What moves the images, or `None`.
    :param ranks: The processes that train together.
    :param writes: Whether this process writes files.
    :param nb_batches: Number of batches in an epoch.
    :param begins: The first epoch of the second stage.
    """

    options: ReuseOptions
    kept: Perturbations
    files: PerturbationFiles | None
    augmentation: CropAndFlip | None
    ranks: Ranks
    writes: bool
    nb_batches: int
    begins: int
    _exchanged: int = field(init=False, default=0)

    def load_epochs(self, batches_done: int) -> None:
        """
        Load what the finished epochs of a resumed run had found, or make the files of a new one.

        :param batches_done: Number of batches that the run has trained.
        :raises ValueError: If a file is missing, incomplete, or of another run or time.
        :raises OSError: If the disk is too small.
        """
        if self.files is None:
            return
        epoch = batches_done // self.nb_batches
        if epoch > self.begins:
            self.files.load_epochs(epoch, self.nb_batches)
        elif batches_done <= self.begins * self.nb_batches and self.writes:
            self.files.create()

    def load_batches(self, batches_done: int) -> None:
        """
        Load what the batches of an unfinished epoch had found; after :meth:`load_epochs`.

        :param batches_done: Number of batches that the run has trained.
        :raises ValueError: As :meth:`load_epochs`.
        """
        if self.files is not None and batches_done > self.begins * self.nb_batches:
            self.files.load_batches(batches_done, self.nb_batches)
            self._exchanged = batches_done

    def perturb(
        self, objective: Objective, attack: TensorAttack, batch: Batch, *, seed: int, epoch: int, stamp: int
    ) -> torch.Tensor:
        """
        Perturb a batch, and keep what was found.

        :param objective: What is climbed.
        :param attack: The attack whose turn it is.
        :param batch: The batch after the augmentation.
        :param seed: The run's seed.
        :param epoch: The epoch, from 0.
        :param stamp: The number of the batch, in the whole run and from 1.
        :return: Perturbed inputs, shape of ``batch.x``, detached.
        """
        assert batch.index is not None
        known = self.kept.known(batch)
        if known.all() or not known.any():
            return self._perturb(objective, attack, batch, (seed, epoch), stamp, is_known=bool(known.all()))
        x_adv = batch.x.clone()
        for is_known in (False, True):
            places = torch.nonzero(known == is_known)[:, 0]
            found = self._perturb(objective, attack, batch.take(places), (seed, epoch), stamp, is_known=is_known)
            x_adv[places.to(x_adv.device, non_blocking=True)] = found
        return x_adv

    def go_on(
        self, objective: Objective, attack: TensorAttack, batch: Batch, shares: torch.Tensor, moves: Moves | None
    ) -> torch.Tensor:
        """
        Attack from earlier perturbations.

        :param objective: What is climbed.
        :param attack: The attack.
        :param batch: The batch after the augmentation.
        :param shares: The perturbations in the images' own frame, as shares of ε.
        :param moves: How the images were moved, or `None`.
        :return: Perturbed inputs, shape of ``batch.x``, detached.
        """
        delta = self.kept.decoded(shares if moves is None else moves.apply(shares), attack.eps)
        steps, size = self.options.steps, self.options.step_size
        return attack.go_on(objective.climbed, batch, delta, nb_steps=steps, step=size)

    def moves(self, batch: Batch, seed: int, epoch: int) -> Moves | None:
        """Return how the augmentation moves the images of a batch in an epoch; `None` without one."""
        if self.augmentation is None:
            return None
        assert batch.index is not None
        index = batch.index.to(batch.x.device, non_blocking=True)
        return self.augmentation.moves(index, *batch.x.shape[-2:], seed, epoch)

    def save(self, batches_done: int) -> None:
        """Exchange what is new between the processes, and save it if there are files."""
        if batches_done <= self.begins * self.nb_batches:
            return
        self.kept.exchange(self._exchanged, self.ranks)
        self._exchanged = batches_done
        if self.files is not None and self.writes:
            self.files.save(batches_done, self.nb_batches)

    def _perturb(
        self,
        objective: Objective,
        attack: TensorAttack,
        batch: Batch,
        counters: tuple[int, int],
        stamp: int,
        *,
        is_known: bool,
    ) -> torch.Tensor:
        index, moves = batch.index, self.moves(batch, *counters)
        assert index is not None
        before = self.kept.get(index, batch.x.device)
        x_adv = self.go_on(objective, attack, batch, before, moves) if is_known else objective.perturb(attack, batch)
        shares = self.kept.encoded(x_adv - batch.x, attack.eps)
        self.kept.put(index, shares if moves is None else moves.undo(shares, before), stamp)
        return x_adv


def make_reuse(
    options: TrainerOptions, attacks: Sequence[TensorAttack], batches: Batches, keeper: Keeper, ranks: Ranks
) -> Reuse | None:
    """
    Return how attacks go on from the last epoch's; `None` if the full attack is run in every epoch.

    :param options: The trainer's options.
    :param attacks: The attacks, which take turns.
    :param batches: The training data.
    :param keeper: Saves the run.
    :param ranks: The processes that train together.
    :raises ValueError: If `reuse_perturbations` says that they must be reused, and they cannot be.
    """
    reuse = options.reuse_perturbations
    if reuse is None:
        return None
    why = _why_not(reuse, options, attacks, batches)
    place = None
    if why is None:
        assert isinstance(batches, ArrayBatches)
        shape, ball = tuple(batches.x.shape), _ascent(attacks[0]).ball
        needed = Perturbations.bytes_of(shape, ball)
        place = place_for(needed, attacks[0].classifier.device, DEVICE_SHARE)
        if place is None:
            why = f"they take {needed:,} bytes, more than the memory that is free"
    if why is not None:
        if reuse.required:
            raise ValueError(
                f"`reuse_perturbations`: perturbations cannot be reused: {why}. Pass None for the full attack in every "
                'epoch, or "auto".'
            )
        if ranks.rank == 0:
            logger.info("The full attack is run in every epoch, because perturbations cannot be reused: %s.", why)
        return None
    assert place is not None
    kept = Perturbations(shape, ball, place)
    folder = keeper.folder
    if ranks.rank == 0:
        on_disk = "" if folder is None else f", twice that in {folder}"
        logger.info("The second stage reuses perturbations. They take %s bytes of memory%s.", f"{needed:,}", on_disk)
    augmentation = options.augmentation
    return Reuse(
        options=reuse,
        kept=kept,
        files=None if folder is None else PerturbationFiles(folder, keeper.identity, kept),
        augmentation=augmentation if isinstance(augmentation, CropAndFlip) else None,
        ranks=ranks,
        writes=keeper.writes,
        nb_batches=batches.nb_batches,
        begins=options.warmup,
    )


def _why_not(
    reuse: ReuseOptions, options: TrainerOptions, attacks: Sequence[TensorAttack], batches: Batches
) -> str | None:
    """Return why perturbations cannot be reused, or, unless they must be, why they need not be; or `None`."""
    if not isinstance(batches, ArrayBatches):
        return "the batches of a generator do not say which image is which"
    augmentation = options.augmentation
    if augmentation is not None and not isinstance(augmentation, CropAndFlip):
        return f"`augmentation`, {type(augmentation).__name__}, does not say where a pixel went; CropAndFlip does"
    if isinstance(augmentation, CropAndFlip) and batches.x.ndim != 4:
        return f"CropAndFlip moves images of shape (channels, height, width), not {tuple(batches.x.shape[1:])}"
    found = [attack.ascent for attack in attacks]
    if None in found:
        return next(attack.why_generate for attack in attacks if attack.why_generate is not None)
    first, *others = (ascent for ascent in found if ascent is not None)
    if any(type(other.ball) is not type(first.ball) or not _equal(other.ball.eps, first.ball.eps) for other in others):
        return "the attacks have different balls"
    cls = find_objective(options.objective)
    full = 1 if cls.single_step or cls.nb_steps == 1 else min(ascent.nb_steps for ascent in (first, *others))
    if not reuse.required and full <= reuse.steps:
        return f"the full attack has {full} steps, no more than a reused one"
    return None


def _equal(one: float | torch.Tensor, other: float | torch.Tensor) -> bool:
    return bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))


def _ascent(attack: TensorAttack) -> Ascent:
    ascent = attack.ascent
    assert ascent is not None  # checked before the run
    return ascent
