"""Notice catastrophic overfitting of training with few attack steps, and back off."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.config import FitOptions, TrainerOptions
from art_clat.training.averaging import Snapshot
from art_clat.training.checkpoint import Progress
from art_clat.training.data import Batches
from art_clat.training.finite import FiniteGuard
from art_clat.training.keeper import Keeper
from art_clat.training.objectives import Objective
from art_clat.training.objectives.rivals import REACH
from art_clat.utils.batch import Batch
from art_clat.utils.modes import evaluation_mode
from art_clat.utils.processes import Part
from art_clat.utils.randomness import seeded_randomness

logger = logging.getLogger(__name__)

#: Number of training samples that a check measures.
NB_CHECKED = 64
#: Samples that are trained for each sample that is checked. A check takes 24 passes a sample (11 attack steps of 2, and
#: 2), training takes 5 (an attack step of 2, and 3). So the checks cost 3 % of the training.
TRAINED_PER_CHECKED = 160
#: Steps of the attack that robust accuracy is measured with, and their summed length in units of ε.
CHECK_STEPS, CHECK_REACH = 10, 2.5
#: With this number of steps the training is that of PGD and is no longer watched.
MANY_STEPS = 8


class OverfittingGuard:
    """
    Watches the training of an objective whose attack makes few steps (``Objective.nb_steps``).

    Within a few batches such a network may learn to resist its training attack alone: catastrophic overfitting (Wong et
    al., arXiv 2001.03994). Every few batches, and before a stage ends, the accuracies under the training attack and
    under PGD-10 are measured on the same 64 training samples. If PGD-10's is below half of its best so far, and more
    than 0.2 below the training attack's, the network gets the weights of the last good check back, and the attack makes
    twice as many steps from then on. At 8 steps it is PGD, and the watch ends.

    :param attack: Gives the ball, and the classifier that is measured.
    :param batches: The training data.
    :param options: The trainer's options.
    :param fit: The options of ``fit``.
    :param keeper: Saves the last good weights. Its average begins anew when they are put back.
    """

    def __init__(
        self,
        attack: TensorAttack,
        batches: Batches,
        options: TrainerOptions,
        fit: FitOptions,
        keeper: Keeper,
    ) -> None:
        self._attack = attack
        self._batches = batches
        self._options = options
        self._fit = fit
        self._average = keeper.average
        keeper.hold(self)
        self._objective: Objective | None = None
        self._good: Snapshot | None = None
        self._is_loaded = False
        self._sample: list[Batch] = []

    def begin(self, objective: Objective, progress: Progress) -> None:
        """
        Begin to watch a stage, or nothing if its objective does not ask for it.

        :param objective: What is trained; its attack gets the number of steps reached so far.
        :param progress: Where the run is.
        """
        if objective.nb_steps is not None:
            objective.nb_steps = progress.attack_steps
        if objective.nb_steps is None or progress.attack_steps >= MANY_STEPS:
            self._objective, self._good = None, None
            return
        self._objective = objective
        if not self._sample:
            classifier = self._attack.classifier
            with seeded_randomness(progress.seed, classifier.device):
                self._sample = first_samples(self._batches.sample(NB_CHECKED, classifier.ranks), NB_CHECKED)
        if self._is_loaded:  # the run is resumed within this stage
            self._is_loaded = False
            return
        self._good = Snapshot(self._attack.classifier.model)
        chance = 1 / self._attack.classifier.nb_classes
        progress.best_checked = max(self._accuracies(progress)[1], chance)

    def check(self, progress: Progress, number: int, finite: FiniteGuard) -> None:
        """
        Check the network if it is time. If it has overfitted, put the last good weights back and raise the steps.

        :param progress: Where the run is.
        :param number: Number within the epoch of the batch that was trained last.
        :param finite: Remembers the weights that are put back.
        """
        if self._objective is None or self._good is None or not self._is_due(progress.epoch, number + 1):
            return
        trained, strong = self._accuracies(progress)
        if strong >= progress.best_checked / 2 or trained <= strong + 0.2:
            progress.best_checked = max(progress.best_checked, strong)
            self._good.take()
            return
        self._good.apply()
        finite.after_step(look=True)
        self._attack.classifier.estimator.optimizer.state.clear()  # its momentum is that of the weights that are gone
        if self._average is not None:
            self._average.begin()
        before, progress.attack_steps = progress.attack_steps, 2 * progress.attack_steps
        is_first = before == 1 and self._attack.classifier.ranks.rank == 0
        logger.log(
            logging.WARNING if is_first else logging.DEBUG,
            "Catastrophic overfitting in epoch %d, batch %d: accuracy on training samples is %.0f %% under %d attack "
            "step(s) and %.0f %% under PGD-%d. The last good weights are restored, and the attack makes %d steps from "
            "now on. To train with single steps throughout, use a smaller learning rate.",
            *(progress.epoch, number, 100 * trained, before, 100 * strong, CHECK_STEPS, progress.attack_steps),
        )
        self._objective.nb_steps = progress.attack_steps
        if progress.attack_steps >= MANY_STEPS:
            self._objective, self._good = None, None

    def _is_due(self, epoch: int, trained: int) -> bool:
        """Return whether to check after so many batches of an epoch: every few of the run, and when a stage ends."""
        nb_batches, following = self._batches.nb_batches, epoch + 1
        if trained == nb_batches and (following == self._fit.nb_epochs or self._options.chooses_before(following)):
            return True
        number = sum(batch.part.total for batch in self._sample)
        return (epoch * nb_batches + trained) % math.ceil(TRAINED_PER_CHECKED * number / self._batches.batch_size) == 0

    def state(self) -> dict[str, torch.Tensor]:
        """Copy the last good weights to the CPU, by name; empty if nothing is watched."""
        return {} if self._good is None else self._good.state()

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what :meth:`state` returned; a KeyError if a tensor is missing."""
        self._good = Snapshot(self._attack.classifier.model)
        self._good.load(state)
        self._is_loaded = True

    def _accuracies(self, progress: Progress) -> tuple[float, float]:
        """Return the accuracies under the training attack and under PGD-10, in [0, 1], equal in every process."""
        classifier = self._attack.classifier
        correct = torch.zeros(2, dtype=torch.int64, device=classifier.device)
        attacks = ((progress.attack_steps, REACH), (CHECK_STEPS, CHECK_REACH))
        with seeded_randomness(progress.seed, classifier.device), evaluation_mode(classifier.model):
            for batch in (batch.to(classifier.device) for batch in self._sample if len(batch)):
                right = classifier.one_hot(batch.y).argmax(dim=1)
                for row, (nb_steps, reach) in enumerate(attacks):
                    x_adv = self._attack.in_few_steps(batch, nb_steps, reach=reach)
                    with torch.no_grad():
                        correct[row] += (classifier.logits(x_adv).argmax(dim=1) == right).sum()
        number = sum(batch.part.total for batch in self._sample)
        trained, strong = (classifier.ranks.sum(correct).double() / number).tolist()
        return trained, strong


def first_samples(batches: Sequence[Batch], number: int) -> list[Batch]:
    """Return the first samples of batches, over all processes."""
    kept: list[Batch] = []
    for batch in batches:
        total = min(batch.part.total, number - sum(one.part.total for one in kept))
        places = torch.arange(batch.part.total)[batch.part.mine]
        here = int((places < total).sum())
        if total:
            kept.append(replace(batch.take(torch.arange(here)), part=Part(total, places[:here])))
    return kept
