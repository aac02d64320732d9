"""How strong an attack is that goes on from the last epoch's perturbations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.config import FitOptions, TrainerOptions
from art_clat.training.checkpoint import Progress
from art_clat.training.data import Batches
from art_clat.training.history import StrengthRecord
from art_clat.training.keeper import Keeper
from art_clat.training.objectives import Objective
from art_clat.training.reuse import Reuse, make_reuse
from art_clat.utils.batch import Batch
from art_clat.utils.processes import Ranks
from art_clat.utils.randomness import reseed

logger = logging.getLogger(__name__)

#: Steps of the attack that others are compared with. Each is a quarter of ε.
STEPS = 20

#: The measured images are one of so many training images, and 256 at most.
ONE_OF, MOST = 50, 256

#: Epochs from one measurement to the next. With one image of fifty it takes 3 % of the time of the epochs in between.
EVERY = 10

#: How far a reused attack may fall behind the full one, measured on so many images, before a warning.
MARGIN, ENOUGH = 0.02, 16


@dataclass(kw_only=True)
class StrengthMeter:
    """
    Measures, in the middle of an epoch, what attacks reach on some images with the weights of that moment.

    The perturbations that the epoch began with are then as old, on average, as those that its batches go on from.

    :param reuse: The attacks.
    :param images: The images that this process measures, the same in all epochs.
    """

    reuse: Reuse
    images: Batch

    def __post_init__(self) -> None:
        self._warned = False
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Remember the perturbations that the epoch begins with."""
        index = self.images.index
        assert index is not None
        self._known = torch.nonzero(self.reuse.kept.known(self.images))[:, 0]
        self._shares = self.reuse.kept.get(index[self._known], self.images.x.device)

    def save(self, batches_done: int) -> None:
        """Exchange and save what attacks have found; all processes must call this."""
        self.reuse.save(batches_done)
        if batches_done % self.reuse.nb_batches == 0:
            self.begin_epoch()

    def measure_if_due(
        self,
        objective: Objective,
        attack: TensorAttack,
        load: Callable[[Batch, int], Batch],
        progress: Progress,
        number: int,
    ) -> None:
        """
        Measure before batch `number`, if it is the middle of an epoch in which this is due, and record it.

        :param objective: What is climbed.
        :param attack: The attack.
        :param load: Moves a batch to the device and augments it.
        :param progress: Where the run is, and its record.
        :param number: Number of the next batch; the same in all processes.
        """
        epoch, records = progress.epoch, progress.history.strengths
        is_middle = number == self.reuse.nb_batches // 2 and epoch > self.reuse.begins
        if is_middle and (not records or epoch - records[-1].epoch >= EVERY):
            images = load(self.images, number)
            record = self.measure(objective, attack, images, seed=progress.seed, epoch=epoch)
            records += [] if record is None else [record]

    def measure(
        self, objective: Objective, attack: TensorAttack, images: Batch, *, seed: int, epoch: int
    ) -> StrengthRecord | None:
        """
        Measure attacks.

        :param objective: What is climbed.
        :param attack: The attack.
        :param images: The measured images as the epoch's augmentation makes them.
        :param seed: The run's seed.
        :param epoch: The epoch, from 0.
        :return: The record; `None` if no measured image has a perturbation yet.
        """
        reseed(images.x.device, seed, epoch, 0, STEPS)
        batch = images.take(self._known)
        sums = torch.zeros(4, device=images.x.device)
        if len(batch):
            random = attack.random_start(batch) - batch.x
            step, shares = attack.eps / 4, self._shares.to(batch.x.device)
            for place, x_adv in enumerate(
                (
                    attack.go_on(objective.climbed, batch, random, nb_steps=STEPS, step=step),
                    self.reuse.go_on(objective, attack, batch, shares, self.reuse.moves(batch, seed, epoch)),
                    objective.perturb(attack, batch),
                )
            ):
                with attack.classifier.attacked(), torch.no_grad():
                    sums[place] = objective.climbed(batch)(x_adv).sum()
            sums[3] = len(batch)
        longest, reused, full, number = self.reuse.ranks.sum(sums).tolist()
        if not number:
            return None
        record = StrengthRecord(epoch, reused / longest, full / longest, int(number))
        is_weak = record.images >= ENOUGH and record.reused < record.full - MARGIN
        if is_weak and not self._warned and self.reuse.ranks.rank == 0:
            logger.warning(
                "Reused perturbations reach %.3f of the loss that %d steps reach, the full attack %.3f: use more steps "
                "(`reuse_perturbations=%d`), or None for the full attack.",
                record.reused,
                STEPS,
                record.full,
                self.reuse.options.steps + 1,
            )
        self._warned |= is_weak
        return record


def begin_reuse(
    options: TrainerOptions,
    attacks: Sequence[TensorAttack],
    batches: Batches,
    keeper: Keeper,
    ranks: Ranks,
    progress: Progress,
    fit: FitOptions,
    sample: Sequence[Batch],
) -> StrengthMeter | None:
    """
    Find out whether attacks go on from the last epoch's, and load what a resumed run has found.

    :param options: The trainer's options.
    :param attacks: The attacks, which take turns.
    :param batches: The training data.
    :param keeper: Saves the run.
    :param ranks: The processes that train together.
    :param progress: Where the run is.
    :param fit: The options of ``fit``.
    :param sample: The samples that selections measure on; the strength is measured on some of them.
    :return: What measures, with the attacks; `None` if the full attack is run in every epoch.
    """
    if fit.nb_epochs <= max(options.warmup, progress.epoch):
        return None
    reuse = make_reuse(options, attacks, batches, keeper, ranks)
    if reuse is None:
        return None
    number = -(-min(MOST, max(1, batches.nb_samples // ONE_OF)) // ranks.size)
    index = torch.cat([batch.index for batch in sample if batch.index is not None])[:number]
    x, y = (torch.cat(values)[:number] for values in zip(*((batch.x, batch.y) for batch in sample), strict=True))
    done = progress.epoch * batches.nb_batches + progress.batch
    reuse.load_epochs(done)
    meter = StrengthMeter(reuse=reuse, images=replace(Batch.whole(x, y), index=index))
    reuse.load_batches(done)
    return meter
