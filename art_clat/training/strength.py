"""How strong an attack is that goes on from the last epoch's perturbations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.training.history import StrengthRecord
from art_clat.training.objectives import Objective
from art_clat.training.reuse import Reuse
from art_clat.utils.batch import Batch
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

    @classmethod
    def begin(cls, reuse: Reuse, sample: Sequence[Batch], batches_done: int) -> StrengthMeter:
        """
        Load what a resumed run has found, and make a meter that measures on some of the samples of the selections.

        :param reuse: The attacks.
        :param sample: The samples that selections measure on.
        :param batches_done: Number of batches that the run has trained.
        """
        number = -(-min(MOST, max(1, len(reuse.kept.stamps) // ONE_OF)) // reuse.ranks.size)
        index = torch.cat([batch.index for batch in sample if batch.index is not None])[:number]
        x, y = (torch.cat(values)[:number] for values in zip(*((batch.x, batch.y) for batch in sample), strict=True))
        reuse.load_epochs(batches_done)
        meter = cls(reuse=reuse, images=replace(Batch.whole(x, y), index=index))
        reuse.load_batches(batches_done)
        return meter

    def begin_epoch(self) -> None:
        """Remember the perturbations that the epoch begins with."""
        index = self.images.index
        assert index is not None
        self._known = torch.nonzero(self.reuse.kept.known(self.images))[:, 0]
        self._shares = self.reuse.kept.get(index[self._known], self.images.x.device)

    def is_due(self, epoch: int, number: int, history: Sequence[StrengthRecord]) -> bool:
        """Return whether to measure before batch `number` of an epoch; the same in all processes."""
        is_middle = number == self.reuse.nb_batches // 2 and epoch > self.reuse.begins
        return is_middle and (not history or epoch - history[-1].epoch >= EVERY)

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
            step = attack.eps / 4
            for place, x_adv in enumerate(
                (
                    attack.go_on(objective.climbed, batch, random, nb_steps=STEPS, step=step),
                    self.reuse.go_on(objective, attack, batch, self._shares, self.reuse.moves(batch, seed, epoch)),
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
