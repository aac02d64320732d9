"""One call of ``fit``: epochs, batches, selections, validation and the record."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.config import FitOptions, TrainerOptions
from art_clat.layers.freezing import only_trainable
from art_clat.layers.layer import Layer
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.selection.candidates import Candidates
from art_clat.selection.choice import choose
from art_clat.selection.rules import as_rule
from art_clat.training.augmentation import augment, check_augmented
from art_clat.training.callbacks import Callbacks, RunEvent
from art_clat.training.checkpoint import Keeper, Progress
from art_clat.training.checks import check_training_output, warn_before_a_run
from art_clat.training.data import Batches
from art_clat.training.description import configuration
from art_clat.training.finite import FiniteGuard, explained
from art_clat.training.history import History, SelectionRecord
from art_clat.training.objectives import BatchLoss, find_objective
from art_clat.training.reuse import make_reuse
from art_clat.training.schedule import Schedule
from art_clat.training.setup import draw_seed, find_eligible, nb_measured, restored_model
from art_clat.training.stage import EpochSums, Stage, clip_gradient, make_record
from art_clat.training.strength import StrengthMeter
from art_clat.training.validation import measure_accuracies
from art_clat.training.watch import FirstBatches, warn_about_still_layers
from art_clat.utils.batch import Batch
from art_clat.utils.processes import Ranks
from art_clat.utils.progress import epoch_bar
from art_clat.utils.randomness import reseed, seeded_randomness

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainingLoop:
    """
    The procedure of the paper: adversarial training, then rounds of selection and fine-tuning.

    Each step is a method that a subclass can override. A trainer runs the class in its ``loop_class``.

    :param estimator: The classifier that is trained.
    :param attacks: The attacks, which take turns over the batches.
    :param options: The trainer's options.
    :param fit: The options of this call of ``fit``.
    :param batches: The training data.
    :param validation: Inputs and labels to validate on, or `None`.
    :param schedule: What steps the learning rate.
    :param keeper: Saves the run, keeps the best epoch, and holds the average of the weights.
    :param ranks: The processes that train together.
    """

    estimator: PyTorchClassifier
    attacks: Sequence[EvasionAttack]
    options: TrainerOptions
    fit: FitOptions
    batches: Batches
    validation: tuple[torch.Tensor, torch.Tensor] | None
    schedule: Schedule
    keeper: Keeper
    ranks: Ranks

    progress: Progress = field(init=False)
    stage: Stage = field(init=False)

    def __post_init__(self) -> None:
        self.classifier = TensorClassifier(self.estimator, self.options.performance, self.ranks)
        self.model, self.device = self.classifier.model, self.classifier.device
        self.optimizer: torch.optim.Optimizer = self.estimator.optimizer
        self.training_attacks = [TensorAttack(attack, self.classifier) for attack in self.attacks]
        self.measured_classifier = self.classifier.in_float32()
        self.measuring_attack = TensorAttack(self.attacks[0], self.measured_classifier)
        self._trainable = {p for p in self.estimator._model.parameters() if p.requires_grad}
        self.callbacks = Callbacks(self.fit.callbacks, self.ranks, self.device)
        self._freezing = ExitStack()

    @property
    def history(self) -> History:
        """The record so far."""
        return self.progress.history

    @property
    def counters(self) -> tuple[int, int]:
        """Seed and epoch, which all random numbers of an epoch follow from."""
        return self.progress.seed, self.progress.epoch

    def prepare(self) -> None:
        """
        Resume or begin the run, find the layers, and refuse what cannot be trained.

        :raises ValueError: If the checkpoint is of another run, or layers, budget and optimiser do not fit together.
        """
        drawn = draw_seed(self.options.seed, self.ranks, self.device)
        resumed = self.keeper.resume()
        said = {"nb_epochs": self.fit.nb_epochs, **self.batches.describe(), **self.fit.describe_steps()}
        made_with = configuration(self.estimator, self.options, self.attacks, self.schedule.scheduler, said)
        self.progress = resumed or Progress(seed=drawn, history=History(configuration=made_with))
        self.is_resumed = resumed is not None
        if resumed is not None:
            resumed.go_on(self.fit.nb_epochs, self.ranks.rank)
        else:
            self.schedule.check_new(is_whole=not self.fit.resume, rank=self.ranks.rank)
            if self.ranks.rank == 0:
                warn_before_a_run(self.options, self.training_attacks, self.fit)
        self.ranks.check_same({"the checkpoint": (*self.counters, self.progress.batch)}, self.device)
        with seeded_randomness(self.progress.seed, self.device):
            if self.options.warmup:
                check_training_output(self.classifier, self.batches.example())
            self.sample = self.batches.sample(nb_measured(self.options, self.attacks, self.batches), self.ranks)
            self.layers = self.classifier.find_layers(self.batches.example(), self.options.layers)
        self.begin_reuse()
        self.eligible = find_eligible(self.layers, self.options, self.model, self.optimizer)

    def run(self) -> None:
        """
        Train until the last epoch; call :meth:`prepare` first.

        :raises FloatingPointError: If the loss or its gradient is not finite.
        """
        with restored_model(self.estimator, self.options.performance, self.progress.seed) as self._freezing:
            self.save()  # refuses a scheduler that cannot be saved before any work
            names = self.progress.chosen
            self.begin_stage(None if names is None else [layer for layer in self.layers if layer.name in names])
            if self.keeper.average is not None and not self.is_resumed:
                self.keeper.average.begin()  # after all processes got the first one's weights
            self.tell("on_run_begin")
            with epoch_bar(self.progress.epoch, self.fit.nb_epochs, self.fit.verbose and self.ranks.rank == 0) as bar:
                while self.goes_on():
                    self.tell("on_epoch_begin")
                    if self.selection_is_due() and self.goes_on():
                        self.tell("on_selection_begin")
                        self.begin_stage(self.select())
                        self.tell("on_selection_end")
                    bar.set_description(self.stage.title)
                    self.train_epoch()
                    if not self.progress.stopped or len(self.history.epochs) > self.progress.epoch:
                        self.end_epoch()
                        bar.set_postfix(self.history.epochs[-1].summary(), refresh=False)
                        bar.update()
            if self.progress.stopped:
                self.save()
            self.keeper.finish(restore_best=self.fit.restore_best)
            self.tell("on_run_end")

    def goes_on(self) -> bool:
        """Return whether there is something left to train, and no callback has ended the run."""
        return self.progress.epoch < self.fit.nb_epochs and not self.progress.stopped

    def tell(self, moment: str, batch: int | None = None, loss: BatchLoss | None = None) -> None:
        """Call a method of the callbacks; the run is stopped if one of them says so."""
        batch = self.progress.batch if batch is None else batch
        self.progress.stopped |= self.callbacks.tell(moment, lambda: RunEvent.of(self, batch, loss))

    def selection_is_due(self) -> bool:
        """Return whether layers are chosen before the next batch."""
        rounds, rest = divmod(self.progress.epoch - self.options.warmup, self.options.reselect_every)
        is_made = any(record.epoch == self.progress.epoch for record in self.history.selections)  # and then stopped
        return rounds >= 0 and rest == 0 and self.progress.batch == 0 and not is_made

    def begin_stage(self, chosen: list[Layer] | None) -> None:
        """Begin to train the chosen layers alone, or the whole network (`None`)."""
        if chosen is None:
            cls = find_objective(self.options.first_stage, argument="first_stage")
            objective = cls(self.classifier, None, cls.default_weight)
        else:
            self.freeze(chosen)
            warn_about_still_layers(self.measured_classifier, chosen, self.sample[0], ranks=self.ranks)
            cls, weight = find_objective(self.options.objective), self.options.criticality_weight
            objective = cls(self.classifier, chosen, weight)
        self.stage = Stage.begin(chosen, objective, self.ranks)
        self.first_batches = FirstBatches(objective)

    def freeze(self, chosen: list[Layer]) -> None:
        """Freeze everything outside the chosen layers, and drop the optimiser's state of what is frozen."""
        self._freezing.close()  # a layer that is chosen again must not move by old momentum
        self._freezing.enter_context(only_trainable(self.model, chosen))
        self.estimator._model.zero_grad()  # an optimiser skips parameters without a gradient
        for parameter in (p for p in self._trainable if not p.requires_grad):
            self.optimizer.state.pop(parameter, None)

    def select(self) -> list[Layer]:
        """Measure every layer (eq. 2, 3), choose by the rule within the budget, and record both."""
        start = time.perf_counter()
        candidates = Candidates(
            self.measured_classifier,
            self.layers,
            self.eligible,
            self.sample,
            self.measuring_attack,
            seed=self.progress.seed,
            round=len(self.history.selections),
            predecessor=self.options.layers.predecessor,
        )
        with seeded_randomness(self.progress.seed, self.device):
            measured = candidates.criticality
            choice = choose(as_rule(self.options.selection.rule), candidates, self.options.budget)
        record = SelectionRecord.of(
            choice,
            measured,
            epoch=self.progress.epoch,
            rule=self.options.selection.rule_name,
            trainable=self._trainable,
            model=self.model,
            seconds=time.perf_counter() - start,
        )
        self.history.selections.append(record)
        self.progress.chosen = list(record.chosen)
        logger.log(logging.INFO if self.ranks.rank == 0 else logging.DEBUG, "%s", record.sentence())
        return choice.layers

    def train_epoch(self) -> None:
        """Train an epoch, or the rest of it, and record it, unless a callback stops the run before its end."""
        progress, start = self.progress, time.perf_counter() - self.progress.seconds
        self.guard = FiniteGuard(self.model, every=self.look_every(), ranks=self.ranks)
        sums = EpochSums(self.device)
        reseed(self.device, *self.counters)
        for number, batch in enumerate(self.batches.epoch(progress.batch, self.ranks), start=progress.batch):
            if progress.stopped:
                return
            self.tell("on_batch_begin", number)
            batch = self.load(batch, number)
            x_adv = self.perturb(batch, number)
            learning_rate = float(self.optimizer.param_groups[0]["lr"])
            place = f"epoch {progress.epoch}, batch {number}", self.options.criticality_weight
            with explained(self.optimizer, *place):
                loss = self.step(batch, x_adv, number)
            if self.keeper.average is not None:
                self.keeper.average.update(self._batches_before(number))
            sums.add(loss, self.classifier.one_hot(batch.y).argmax(dim=1))
            self.schedule.after_batch(self._batches_before(number + 1))
            self.tell("on_batch_end", number, loss)
            is_last = number + 1 == self.batches.nb_batches
            if is_last or progress.stopped or self.keeper.is_due(number + 1):
                with explained(self.optimizer, *place):
                    self.guard.after_step(look=True)
                progress.batch, progress.seconds = number + 1, time.perf_counter() - start
                progress.sums = sums.take(progress.sums, self.ranks)
                if not is_last:
                    self.save()
        self.history.epochs.append(make_record(progress, self.stage, learning_rate))

    def load(self, batch: Batch, number: int) -> Batch:
        """Move a batch to the device, augment it, and set its memory format."""
        batch = batch.to(self.device)
        if self.options.augmentation is not None:
            batch = augment(self.options.augmentation, batch, *self.counters, number)
            check_augmented(batch.x, self.classifier.clip_values, number)
        if self.options.performance.channels_last and batch.x.ndim == 4:
            batch = replace(batch, x=batch.x.contiguous(memory_format=torch.channels_last))
        return batch

    def attack_for(self, number: int) -> TensorAttack:
        """Return the attack whose turn it is in batch `number` of the epoch."""
        return self.training_attacks[self._batches_before(number) % len(self.training_attacks)]

    def perturb(self, batch: Batch, number: int) -> torch.Tensor:
        """Perturb the share `ratio` of batch `number`; seed and epoch set its random numbers too."""
        objective, attack = self.stage.objective, self.attack_for(number)
        inner = partial(objective.perturb, attack)
        if self.reuse is not None and self.stage.chosen is not None:
            seed, epoch = self.counters
            if self.meter.is_due(epoch, number, self.history.strengths):
                images, first = self.load(self.meter.images, number), self.training_attacks[0]
                record = self.meter.measure(objective, first, images, seed=seed, epoch=epoch)
                self.history.strengths += [] if record is None else [record]
            stamp = self._batches_before(number) + 1
            inner = partial(self.reuse.perturb, objective, attack, seed=seed, epoch=epoch, stamp=stamp)
        reseed(self.device, *self.counters, number)
        return self.stage.perturb(inner, batch, self.options.ratio)

    def begin_reuse(self) -> None:
        """Find out whether attacks go on from the last epoch's, and load what a resumed run has found."""
        self.reuse = None
        if self.fit.nb_epochs > max(self.options.warmup, self.progress.epoch):
            self.reuse = make_reuse(self.options, self.training_attacks, self.batches, self.keeper, self.ranks)
        if self.reuse is not None:
            self.meter = StrengthMeter.begin(self.reuse, self.sample, self._batches_before(self.progress.batch))

    def save(self) -> None:
        """Save the run; all processes must call this."""
        if self.reuse is not None:
            self.reuse.save(self._batches_before(self.progress.batch))
        self.keeper.save(self.progress)

    def step(self, batch: Batch, x_adv: torch.Tensor, number: int) -> BatchLoss:
        """Make one step of the optimiser on the objective."""
        if self.ranks.size > 1:  # each process drops other units
            reseed(self.device, *self.counters, number, 0, self.ranks.rank)
        self.optimizer.zero_grad()
        loss = self.stage.loss(batch, x_adv)
        self.guard.before_step(loss.loss)
        # Gradients are averaged over processes, but their parts of a batch may differ by one sample.
        (loss.loss * (self.ranks.size * len(batch) / batch.part.total)).backward()
        self.first_batches.add(loss, warns=self.ranks.rank == 0)
        clip_gradient(self.optimizer, self.fit.max_grad_norm)
        self.optimizer.step()
        self.guard.after_step()
        return loss

    def end_epoch(self) -> None:
        """Validate if it is due, step the scheduler, and save."""
        nb_epochs = self.progress.epoch + 1
        is_due = nb_epochs % self.fit.validate_every == 0
        if is_due or not self.goes_on() or nb_epochs == self.fit.nb_epochs:
            self.record_validation()
        self.schedule.after_epoch(nb_epochs, self.history.epochs[-1].robust_accuracy if is_due else None)
        self.tell("on_epoch_end", self.progress.batch - 1)
        if self.progress.stopped:
            self.record_validation()
        self.progress.begin_epoch(nb_epochs)
        self.save()
        if self.reuse is not None:
            self.meter.begin_epoch()
        logger.debug("%s", self.history.epochs[-1])

    def record_validation(self) -> None:
        """Validate the latest epoch, unless that was done, and keep its weights if they are the best."""
        if self.validation is not None and self.history.epochs[-1].robust_accuracy is None:
            with nullcontext() if self.keeper.average is None else self.keeper.average.applied():
                self.history.add_validation(*self.validate())
                self.keeper.consider(self.history.epochs[-1])

    def validate(self) -> tuple[float, float]:
        """Measure clean accuracy, and robust accuracy under the first attack, on the validation data."""
        assert self.validation is not None
        return measure_accuracies(self.measuring_attack, *self.validation, seed=self.progress.seed)

    def look_every(self) -> int:
        """Return after how many batches to check that all is finite; on a GPU a check makes the processor wait."""
        return 50 if self.device.type == "cuda" else 1

    def _batches_before(self, number: int) -> int:
        """Count the batches of the run before batch `number` of this epoch."""
        return self.progress.epoch * self.batches.nb_batches + number
