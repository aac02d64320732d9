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
from art_clat.selection.choice import check_selection, choose, eligible_layers
from art_clat.selection.rules import as_rule
from art_clat.training.augmentation import augment, check_augmented
from art_clat.training.callbacks import Callbacks, RunEvent
from art_clat.training.checkpoint import Progress
from art_clat.training.checks import check_optimizer_trains, check_training_output, warn_before_a_run
from art_clat.training.data import Batches
from art_clat.training.description import configuration
from art_clat.training.finite import FiniteGuard, explained
from art_clat.training.history import History, SelectionRecord
from art_clat.training.keeper import Keeper
from art_clat.training.objectives import BatchLoss, find_objective
from art_clat.training.overfitting import OverfittingGuard
from art_clat.training.schedule import Schedule
from art_clat.training.setup import draw_seed, nb_measured, restored_model
from art_clat.training.stage import EpochSums, Stage, make_record
from art_clat.training.strength import begin_reuse
from art_clat.training.validation import measure_accuracies
from art_clat.training.watch import Watch
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
    :param said: What the trainer has warned of in earlier runs, and need not say again.
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
    said: set[str] = field(default_factory=set)

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
        self.watch = Watch(self.measured_classifier, self.ranks)
        self._freezing = ExitStack()
        self.overfitting = OverfittingGuard(self.measuring_attack, self.batches, self.options, self.fit, self.keeper)

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
        if resumed is None:
            self.schedule.check_new(is_whole=not self.fit.resume, rank=self.ranks.rank)
        else:
            state, level = self.progress.go_on(self.fit.nb_epochs)
            level = level if self.ranks.rank == 0 else logging.DEBUG
            logger.log(level, "The run in the checkpoint %s; the classifier gets its weights.", state)
        self.ranks.check_same({"the checkpoint": (*self.counters, self.progress.batch)}, self.device)
        warn_before_a_run(self.options, self.training_attacks, self.fit, self.ranks, self.said)
        with seeded_randomness(self.progress.seed, self.device):
            self.sample = self.batches.sample(nb_measured(self.options, self.attacks, self.batches), self.ranks)
            self.layers = self.classifier.find_layers(self.batches.example(), self.options.layers)
            check_training_output(self.classifier, self.batches.example(), self.options)
        shared = (self.batches, self.keeper, self.ranks)
        self.meter = begin_reuse(self.options, self.training_attacks, *shared, self.progress, self.fit, self.sample)
        self.eligible = eligible_layers(self.layers, head_eligible=self.options.layers.head_eligible)
        check_selection(self.options.selection.rule, self.options.budget, self.eligible, self.model)
        check_optimizer_trains(self.optimizer, self.model, None if self.options.warmup else self.eligible)

    def run(self) -> None:
        """
        Train until the last epoch; call :meth:`prepare` first.

        :raises FloatingPointError: If the loss or its gradient is not finite.
        """
        estimator, performance = self.estimator, self.options.performance
        with restored_model(estimator, performance, self.progress.seed, self.device) as self._freezing:
            self.save()  # refuses a scheduler that cannot be saved before any work
            self.begin_stage(self.progress.chosen_of(self.layers))
            if self.keeper.average is not None and not self.is_resumed:
                self.keeper.average.begin()  # after all processes got the first one's weights
            self.tell("on_run_begin")
            quiet = self.ranks.rank > 0 or not self.fit.verbose
            with epoch_bar(self.progress.epoch, self.fit.nb_epochs, quiet=quiet) as bar:
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
            if self.keeper.average is not None:
                self.keeper.average.apply()
            if self.fit.restore_best:
                self.keeper.restore_best()
            self.tell("on_run_end")

    def goes_on(self) -> bool:
        """Return whether there is something left to train, and no callback has ended the run."""
        return self.progress.epoch < self.fit.nb_epochs and not self.progress.stopped

    def tell(self, moment: str, batch: int | None = None, loss: BatchLoss | None = None) -> None:
        """Call a method of the callbacks; the run is stopped if one of them says so."""
        if self.callbacks.hear(moment):
            event = RunEvent.of(self, self.progress.batch if batch is None else batch, loss)
            self.progress.stopped |= self.callbacks.tell(moment, event)

    def selection_is_due(self) -> bool:
        """Return whether layers are chosen before the next batch."""
        epoch, made = self.progress.epoch, self.history.selections
        is_made = bool(made) and made[-1].epoch == epoch  # a run may be stopped after it, and go on
        return self.options.chooses_before(epoch) and self.progress.batch == 0 and not is_made

    def begin_stage(self, chosen: list[Layer] | None) -> None:
        """Begin to train the chosen layers alone, or the whole network (`None`)."""
        if chosen is None:
            cls = find_objective(self.options.first_stage, argument="first_stage")
            objective = cls(self.classifier, None, cls.default_weight)
        else:
            self.freeze(chosen)
            cls, weight = find_objective(self.options.objective), self.options.criticality_weight
            objective = cls(self.classifier, chosen, weight)
            self.watch.begin(chosen, objective, self.sample[0])
        self.stage = Stage.begin(chosen, objective, self.ranks, self.options.weight_perturbation)
        self.overfitting.begin(objective, self.progress)

    def freeze(self, chosen: list[Layer]) -> None:
        """Freeze everything outside the chosen layers, and drop the optimiser's state of what is frozen."""
        self._freezing.close()  # a layer that is chosen again must not move by old momentum
        self._freezing.enter_context(only_trainable(self.model, chosen))
        self.estimator._model.zero_grad()  # an optimiser skips parameters without a gradient
        for parameter in self._trainable:
            if not parameter.requires_grad:
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
            with explained(self.optimizer, *place, self.stage.weight_perturbation):
                loss = self.step(batch, x_adv, number)
            if self.keeper.average is not None:
                self.keeper.average.update(self._batches_before(number))
            sums.add(loss, self.classifier.one_hot(batch.y).argmax(dim=1))
            self.schedule.after_batch(self._batches_before(number + 1))
            self.tell("on_batch_end", number, loss)
            is_last = number + 1 == self.batches.nb_batches
            if is_last or progress.stopped or self.keeper.is_due(number + 1):
                with explained(self.optimizer, *place, self.stage.weight_perturbation):
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
        if self.meter is not None and self.stage.chosen is not None:
            self.meter.measure_if_due(objective, self.training_attacks[0], self.load, self.progress, number)
            seed, epoch = self.counters
            stamp = self._batches_before(number) + 1
            inner = partial(self.meter.reuse.perturb, objective, attack, seed=seed, epoch=epoch, stamp=stamp)
        reseed(self.device, *self.counters, number)
        return self.stage.perturb(inner, batch, self.options.ratio)

    def save(self) -> None:
        """Save the run; all processes must call this."""
        if self.meter is not None:
            self.meter.save(self._batches_before(self.progress.batch))
        self.keeper.save(self.progress)

    def step(self, batch: Batch, x_adv: torch.Tensor, number: int) -> BatchLoss:
        """Make one step of the optimiser on the objective."""
        if self.ranks.size > 1:  # each process drops other units
            reseed(self.device, *self.counters, number, 0, self.ranks.rank)
        self.optimizer.zero_grad()
        loss = self.stage.differentiate(batch, x_adv)
        self.guard.before_step(loss.loss)
        self.watch.add(loss)
        if self.fit.max_grad_norm is not None:
            stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(stepped, self.fit.max_grad_norm)
        self.optimizer.step()
        self.guard.after_step()
        self.overfitting.check(self.progress, number, self.guard)
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
