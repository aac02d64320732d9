"""Criticality-Leveraged Adversarial Training (CLAT) as an ART trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from art.attacks import EvasionAttack
from art.data_generators import DataGenerator
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier
from tqdm.auto import trange

from art_clat import validation as check
from art_clat.attacks import OutputAttack
from art_clat.batches import ArrayBatches, Batches, GeneratorBatches
from art_clat.criticality import measure
from art_clat.guest import FiniteGuard, evaluation_mode, own_modes, own_randomness
from art_clat.history import EpochRecord, History, SelectionRecord
from art_clat.layers import Layer, only_trainable, train_only
from art_clat.network import Network
from art_clat.objectives import AdversarialCLAT, AdversarialTraining, BatchLoss, CleanCLAT, Objective
from art_clat.selection import eligible_layers, most_critical

logger = logging.getLogger(__name__)

#: The readings of the CLAT objective, see :class:`AdversarialTrainerCLATPyTorch`.
OBJECTIVES = ("adversarial", "clean")


class AdversarialTrainerCLATPyTorch(AdversarialTrainer):  # type: ignore[misc]
    """
    Criticality-Leveraged Adversarial Training, CLAT (Gopal et al., ICML 2025).

    | Paper link: https://arxiv.org/abs/2408.10204

    1. For `warmup` epochs the whole network is trained adversarially on the attack's examples.
    2. Every `reselect_every` epochs after that, the criticality index of every layer is measured (eq. 2 and 3), the
       layers with the largest are chosen, and everything else is frozen: parameters, BatchNorm statistics, dropout.
    3. Each batch then moves the chosen layers only, by the cross-entropy plus `criticality_weight` times the distance
       of their features under attack (eq. 5 and 6).

    Nothing is added to the network. After ``fit``, also one that raised, its ``requires_grad`` flags, training modes
    and hooks and the global random generators are as they were before. Gradients are dropped, and so is the optimiser's
    state of a layer when it is frozen: stale momentum must not move it when it is chosen again.

    The first stage applies ART's preprocessing of training, the second that of prediction: an augmentation that differs
    between the clean and the perturbed pass would be measured as a feature distance.

    | Please keep in mind the limitations of defences. While adversarial training is widely regarded as a promising,
        principled approach to making classifiers more robust (see https://arxiv.org/abs/1802.00420), very careful
        evaluations are required to assess its effectiveness case by case (see https://arxiv.org/abs/1902.06705).
    """

    def __init__(
        self,
        classifier: PyTorchClassifier,
        attacks: EvasionAttack | list[EvasionAttack],
        ratio: float = 1.0,
        *,
        warmup: int = 0,
        criticality_weight: float = 0.05,
        critical_fraction: float = 0.05,
        reselect_every: int = 10,
        objective: str = "adversarial",
        single_step: bool = False,
        head_eligible: bool = False,
        after_norm: bool = False,
        selection_samples: int = 1024,
        seed: int | None = None,
    ) -> None:
        """
        Create an :class:`.AdversarialTrainerCLATPyTorch` instance.

        :param classifier: Model to train, with an optimiser that holds its parameters.
        :param attacks: Untargeted attack(s) on `classifier`; several are rotated over the batches, and the first one
               measures criticality and robust validation accuracy. Those of the PGD family run in torch on the
               classifier's device, others through their own ``generate``.
        :param ratio: The proportion of samples in each batch to be perturbed, in (0, 1].
        :param warmup: The number of epochs, at the beginning of ``fit``, of plain adversarial training of the whole
               network. At 0 the network is expected to be adversarially trained already.
        :param criticality_weight: λ of eq. 6, at least 0: the weight of the batch mean of the chosen layers' summed
               feature distance. The paper does not report it.
        :param critical_fraction: Share of the layers that are chosen, in (0, 1]; at least one is.
        :param reselect_every: Number of epochs, at least 1, after which the layers are chosen again.
        :param objective: ``"adversarial"``: cross-entropy on the attack's examples, and the feature distance at the
               same perturbations, one attack a batch. ``"clean"``: eq. 5 and 6 to the letter, clean cross-entropy, and
               the feature distance under an inner attack of its own, in the ball and with the steps of the attack of
               the PGD family passed as `attacks`, always from a random start.
        :param single_step: With ``objective="clean"``, make that inner attack one step of size ε ("CLAT (fast)").
        :param head_eligible: Whether the classifier head may be chosen too. Taken literally, eq. 2 and 3 nearly always
               choose it, for its few outputs.
        :param after_norm: Take the features of layers that have a norm after it, in the index and in the objective. At
               `False` they are what the convolution itself returns, the literal reading; before a BatchNorm their
               distance can shrink by the weights' scale alone, which changes nothing in what the network computes.
        :param selection_samples: Number of training samples, at least 1, that criticality is measured on; drawn once.
        :param seed: Seed of the data order, the attacks and dropout, 0 … 2**32 − 1. `None` draws one from NumPy's
               global generator, so that ``np.random.seed`` makes a run repeatable, as with ART's trainers.
        :raises TypeError: If `classifier` is not a ``PyTorchClassifier``, or `attacks` no evasion attack(s).
        :raises ValueError: If an argument is out of its range, the classifier has no optimiser or no weighted layer,
                or an attack is targeted, bound to another classifier, or not usable with ``objective="clean"``.
        """
        check.check_classifier(classifier, needs_optimizer=True)
        if isinstance(classifier.optimizer, torch.optim.LBFGS):
            raise ValueError("`classifier` has the optimizer LBFGS, which wants to evaluate the loss itself.")
        attack_list = attacks if isinstance(attacks, (list, tuple)) else [attacks]
        if not attack_list:
            raise ValueError("`attacks` is empty; at least one attack is needed.")
        for attack in attack_list:
            check.check_attack(attack, classifier, argument="attacks")
        check.check_share(ratio, argument="ratio")
        check.check_whole(warmup, 0, argument="warmup")
        check.check_at_least(criticality_weight, 0, argument="criticality_weight")
        check.check_share(critical_fraction, argument="critical_fraction")
        check.check_whole(reselect_every, 1, argument="reselect_every")
        check.check_whole(selection_samples, 1, argument="selection_samples")
        if seed is not None:
            check.check_seed(seed)
        if objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(map(repr, OBJECTIVES))}, got {objective!r}.")
        if single_step and objective != "clean":
            raise ValueError("`single_step` is the inner attack of `objective='clean'`; it needs that objective.")
        super().__init__(classifier, list(attack_list), ratio)
        self.warmup = warmup
        self.criticality_weight = criticality_weight
        self.critical_fraction = critical_fraction
        self.reselect_every = reselect_every
        self.objective = objective
        self.single_step = single_step
        self.head_eligible = head_eligible
        self.after_norm = after_norm
        self.selection_samples = selection_samples
        self.seed = seed
        #: The record of the latest ``fit``.
        self.history = History()
        self._network = Network(classifier)
        self._attacks = [OutputAttack(attack, self._network) for attack in attack_list]
        if objective == "clean":
            self._check_inner_attack()

    def fit(
        self,
        x: npt.NDArray[np.floating],
        y: npt.NDArray[np.generic],
        validation_data: tuple[npt.NDArray[np.floating], npt.NDArray[np.generic]] | None = None,
        batch_size: int = 128,
        nb_epochs: int = 20,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Train a model adversarially with CLAT. See class documentation for more information on the exact procedure.

        Every call counts its epochs from 0, warm-up included, and begins a new :attr:`history`.

        :param x: Training set, shape (n, *input_shape), floating point, within the classifier's ``clip_values``; it is
               not modified.
        :param y: Index labels, shape (n,), or one-hot labels, shape (n, nb_classes).
        :param validation_data: Tuple (x_val, y_val); clean accuracy and robust accuracy under the first attack are
               recorded after every epoch. They do not influence the training.
        :param batch_size: Size of batches.
        :param nb_epochs: Number of epochs, those of the warm-up included.
        :param scheduler: Learning rate scheduler of the classifier's optimiser, stepped at the end of every epoch.
        :param kwargs: ``verbose``: show a progress bar (default `True`); ``drop_last``: leave out the last batch of an
               epoch if it is smaller than the others (default `False`).
        :raises TypeError: If `kwargs` holds another option, or `scheduler` is no scheduler.
        :raises ValueError: If the data are unusable, or the optimiser does not hold a layer that may be chosen.
        :raises FloatingPointError: If the loss or its gradient is not finite; the last finite weights stay in place.
        """
        options = _options(kwargs)
        check.check_whole(batch_size, 1, argument="batch_size")
        inputs, labels = check.check_data(self._classifier, x, y, argument="x", label_argument="y")
        if options["drop_last"] and len(inputs) < batch_size:
            raise ValueError(
                f"`drop_last` leaves no batch: `x` has {len(inputs)} inputs, `batch_size` is {batch_size}."
            )
        batches = ArrayBatches(inputs, labels, batch_size=batch_size, drop_last=options["drop_last"])
        self._train(batches, validation_data, nb_epochs, scheduler, verbose=options["verbose"])

    def fit_generator(
        self,
        generator: DataGenerator,
        nb_epochs: int = 20,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        validation_data: tuple[npt.NDArray[np.floating], npt.NDArray[np.generic]] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Train a model adversarially with CLAT using a data generator. See class documentation for more information.

        :param generator: Data generator; an epoch is ``ceil(generator.size / generator.batch_size)`` batches.
        :param nb_epochs: Number of epochs, those of the warm-up included.
        :param scheduler: As in :meth:`fit`.
        :param validation_data: As in :meth:`fit`.
        :param kwargs: ``verbose``, as in :meth:`fit`.
        :raises TypeError: If `generator` is no ART data generator; otherwise as in :meth:`fit`.
        :raises ValueError: If the generator's size is unknown; otherwise as in :meth:`fit`, also in the midst of an
                epoch if a later batch is unusable.
        :raises FloatingPointError: As in :meth:`fit`.
        """
        options = _options(kwargs, accepted=("verbose",))
        batches = GeneratorBatches(generator, self._classifier)
        self._train(batches, validation_data, nb_epochs, scheduler, verbose=options["verbose"])

    def _train(
        self,
        batches: Batches,
        validation_data: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None,
        nb_epochs: int,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        *,
        verbose: bool,
    ) -> None:
        """Run the procedure of the paper: adversarial training, then rounds of selection and fine-tuning."""
        check.check_whole(nb_epochs, 1, argument="nb_epochs")
        self._check_scheduler(scheduler)
        validation = None if validation_data is None else self._check_validation(validation_data)
        seed = int(np.random.randint(2**32, dtype=np.uint64)) if self.seed is None else self.seed
        attacks = cycle(self._attacks)
        with own_randomness(seed, self._network.device):
            sample = batches.sample(self.selection_samples)
            layers = self._network.find_layers(sample[0][0], after_norm=self.after_norm)
        eligible = eligible_layers(layers, head_eligible=self.head_eligible)
        self._check_optimizer(None if self.warmup else eligible)
        self.history = history = History()
        with self._as_guest(seed) as freeze:
            chosen: list[Layer] | None = None  # the whole network
            objective: Objective = AdversarialTraining(self._network)
            with trange(nb_epochs, desc="CLAT", unit="epoch", disable=not verbose) as progress:
                for epoch in progress:
                    if epoch >= self.warmup and (epoch - self.warmup) % self.reselect_every == 0:
                        chosen = self._select(epoch, layers, eligible, sample, seed)
                        freeze(chosen)
                        objective = self._make_objective(chosen)
                    progress.set_description("adversarial training" if chosen is None else "CLAT")
                    self._train_epoch(epoch, batches, objective, chosen, attacks)
                    if scheduler is not None:
                        scheduler.step()
                    if validation is not None:
                        history.add_validation(*self._validate(*validation, seed=seed))
                    progress.set_postfix(_summary(history.epochs[-1]))
                    logger.debug("%s", history.epochs[-1])

    def _select(
        self,
        epoch: int,
        layers: list[Layer],
        eligible: list[Layer],
        sample: list[tuple[torch.Tensor, torch.Tensor]],
        seed: int,
    ) -> list[Layer]:
        """Measure every layer (eq. 2, 3) and choose the most critical ones."""
        start = time.perf_counter()
        with own_randomness(seed, self._network.device):
            measured = measure(self._network, layers, sample, self._attacks[0])
        chosen = most_critical(measured, layers, eligible, fraction=self.critical_fraction)
        parameters = {p for layer in chosen for p in layer.parameters() if p in self._trainable}
        record = SelectionRecord(
            epoch=epoch,
            measured=measured,
            chosen=tuple(layer.name for layer in chosen),
            trainable_parameters=sum(p.numel() for p in parameters),
            total_parameters=sum(p.numel() for p in self._network.model.parameters()),
            seconds=time.perf_counter() - start,
        )
        self.history.selections.append(record)
        logger.info(
            "CLAT, epoch %d: training %d of %d layers (%s), %s of %s parameters (%.2f %%).",
            epoch,
            len(chosen),
            len(layers),
            ", ".join(record.chosen),
            f"{record.trainable_parameters:,}",
            f"{record.total_parameters:,}",
            100 * record.trainable_parameters / record.total_parameters,
        )
        return chosen

    def _make_objective(self, chosen: list[Layer]) -> Objective:
        if self.objective == "clean":
            return CleanCLAT(self._network, chosen, self.criticality_weight, single_step=self.single_step)
        return AdversarialCLAT(self._network, chosen, self.criticality_weight)

    def _train_epoch(
        self,
        epoch: int,
        batches: Batches,
        objective: Objective,
        chosen: list[Layer] | None,
        attacks: Iterator[OutputAttack],
    ) -> None:
        """Train one epoch and record it."""
        start = time.perf_counter()
        learning_rate = float(self._classifier.optimizer.param_groups[0]["lr"])
        sums = torch.zeros(4, dtype=torch.float64)
        nb_samples = 0
        for batch, (x, y) in enumerate(batches):
            x, y = x.to(self._network.device), y.to(self._network.device)
            x_adv = self._perturb(objective, next(attacks), x, y)
            self._set_modes(chosen)
            try:
                loss = self._step(objective, x, x_adv, y)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error} in epoch {epoch}, batch {batch}. The likely cause is a learning rate (now "
                    f"{learning_rate:g}) or a `criticality_weight` ({self.criticality_weight:g}) that is too large. "
                    "The last finite weights are in place."
                ) from None
            correct = (loss.logits.argmax(dim=1) == self._network.one_hot(y).argmax(dim=1)).double().mean()
            sums += len(x) * torch.stack([loss.loss.detach(), loss.cross_entropy, loss.criticality_loss, correct]).cpu()
            nb_samples += len(x)
        mean_loss, cross_entropy, criticality_loss, accuracy = (sums / nb_samples).tolist()
        robust = objective.logits_are_adversarial
        self.history.epochs.append(
            EpochRecord(
                epoch=epoch,
                stage="adversarial training" if chosen is None else "clat",
                loss=mean_loss,
                cross_entropy=cross_entropy,
                criticality_loss=criticality_loss,
                learning_rate=learning_rate,
                seconds=time.perf_counter() - start,
                train_clean_accuracy=None if robust else accuracy,
                train_robust_accuracy=accuracy if robust else None,
            )
        )

    def _step(self, objective: Objective, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        """Make one optimiser step on the objective, which moves what is not frozen."""
        optimizer = self._classifier.optimizer
        optimizer.zero_grad()
        guard = FiniteGuard(self._network.model)
        try:
            loss = objective.loss(x, x_adv, y)
        except ValueError as error:
            if len(x) == 1 and "more than 1 value per channel" in str(error):
                raise ValueError(
                    "A batch of one sample cannot pass a BatchNorm in training: use another `batch_size`, or "
                    "`drop_last=True` in `fit`."
                ) from error
            raise
        guard.check("loss, or a BatchNorm statistic,", loss.loss)
        loss.loss.backward()
        optimizer.step()
        guard.check("result of the optimiser's step")
        return loss

    def _perturb(self, objective: Objective, attack: OutputAttack, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Perturb the share `ratio` of a batch, drawn at random."""
        if self.ratio == 1:
            return objective.perturb(attack, x, y)
        perturbed = torch.randperm(len(x), device=x.device)[: int(np.ceil(self.ratio * len(x)))]
        x_adv = x.clone()
        x_adv[perturbed] = objective.perturb(attack, x[perturbed], y[perturbed])
        return x_adv

    def _set_modes(self, chosen: list[Layer] | None) -> None:
        if chosen is None:
            self._network.model.train()
        else:
            train_only(self._network.model, chosen)

    def _validate(self, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> tuple[float, float]:
        """Give clean accuracy and robust accuracy under the first attack."""
        correct = torch.zeros(2, dtype=torch.int64)
        with own_randomness(seed, self._network.device), evaluation_mode(self._classifier._model):
            for start in range(0, len(x), 256):
                batch = x[start : start + 256].to(self._network.device)
                target = y[start : start + 256].to(self._network.device)
                labels = self._network.one_hot(target).argmax(dim=1)
                for row, inputs in enumerate((batch, self._attacks[0](batch, target))):
                    with torch.no_grad():
                        correct[row] += (self._network.logits(inputs).argmax(dim=1) == labels).sum().item()
        clean, robust = (correct.double() / len(x)).tolist()
        return clean, robust

    @contextmanager
    def _as_guest(self, seed: int) -> Iterator[Callable[[list[Layer]], None]]:
        """
        Work on the user's model and put it back: flags, modes, random generators; gradients are dropped.

        Gives a function that freezes everything outside some layers. It also drops the optimiser's state of what it
        freezes: momentum from before must not move a layer that is chosen again.
        """
        model, optimizer = self._classifier._model, self._classifier.optimizer
        self._trainable = {p for p in model.parameters() if p.requires_grad}
        with ExitStack() as stack:
            stack.enter_context(own_modes(model))
            stack.enter_context(own_randomness(seed, self._network.device))
            stack.callback(model.zero_grad)
            freezing = stack.enter_context(ExitStack())

            def freeze(chosen: list[Layer]) -> None:
                freezing.close()
                freezing.enter_context(only_trainable(self._network.model, chosen))
                model.zero_grad()  # an optimiser passes over what has no gradient, whatever its momentum and decay
                for parameter in self._trainable:
                    if not parameter.requires_grad:
                        optimizer.state.pop(parameter, None)

            yield freeze

    def _check_inner_attack(self) -> None:
        for attack in self._attacks:
            if attack.ascent is None:
                raise ValueError(
                    "`objective='clean'` takes the ball and the steps of its inner attack from `attacks`: "
                    "ProjectedGradientDescent, BasicIterativeMethod or FastGradientMethod in the norm inf, 2 or 1 on a "
                    "classifier whose preprocessing is PyTorch's are accepted, "
                    f"got {type(attack.attack).__name__}. `objective='adversarial'` takes any attack."
                )

    def _check_scheduler(self, scheduler: object) -> None:
        if scheduler is None:
            return
        if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            raise TypeError(
                f"`scheduler` must be a torch.optim.lr_scheduler.LRScheduler, got {type(scheduler).__name__}."
            )
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise TypeError("`scheduler` is stepped once an epoch without a metric; ReduceLROnPlateau needs one.")
        if scheduler.optimizer is not self._classifier.optimizer:
            raise ValueError("`scheduler` belongs to another optimizer than `classifier.optimizer`.")

    def _check_validation(
        self, validation_data: tuple[npt.NDArray[Any], npt.NDArray[Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(validation_data, (tuple, list)) or len(validation_data) != 2:
            raise ValueError(f"`validation_data` must be a tuple (x_val, y_val), got {type(validation_data).__name__}.")
        return check.check_data(
            self._classifier, *validation_data, argument="validation_data[0]", label_argument="validation_data[1]"
        )

    def _check_optimizer(self, layers: list[Layer] | None) -> None:
        if layers is None:  # the whole network, by the names of the modules that own the parameters
            parameters = self._network.model.named_parameters()
            named = [(name.rpartition(".")[0] or name, parameter) for name, parameter in parameters]
        else:
            named = [(layer.name, parameter) for layer in layers for parameter in layer.parameters()]
        check.check_optimizer_holds(self._classifier.optimizer, named)


def _options(kwargs: dict[str, Any], accepted: tuple[str, ...] = ("verbose", "drop_last")) -> dict[str, Any]:
    unknown = sorted(set(kwargs) - set(accepted))
    if unknown:
        raise TypeError(f"Unknown option(s) in `**kwargs`: {', '.join(unknown)}; accepted are {', '.join(accepted)}.")
    return {"verbose": True, "drop_last": False, **kwargs}


def _summary(record: EpochRecord) -> dict[str, str]:
    """What the progress bar shows: validation accuracies where there are any, else those of training."""
    clean = record.clean_accuracy if record.clean_accuracy is not None else record.train_clean_accuracy
    robust = record.robust_accuracy if record.robust_accuracy is not None else record.train_robust_accuracy
    shown = {"clean": clean, "robust": robust}
    return {
        "loss": f"{record.loss:.3f}",
        **{name: f"{100 * value:.1f} %" for name, value in shown.items() if value is not None},
    }
