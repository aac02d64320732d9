"""Criticality-Leveraged Adversarial Training (CLAT) as an ART trainer."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from art.attacks import EvasionAttack
from art.data_generators import DataGenerator
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier
from torch import nn
from tqdm.auto import tqdm

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.freezing import only_trainable, train_all, train_only
from art_clat.layers.groups import Granularity, find_groups
from art_clat.layers.layer import Layer
from art_clat.models.checks import check_attack, check_classifier, check_data, check_optimizer_holds
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.selection.budget import Budget
from art_clat.selection.candidates import Candidates
from art_clat.selection.criticality import check_layers_wanted
from art_clat.selection.rules import SelectionRule, as_rule, check_names, choose, eligible_layers
from art_clat.training.averaging import Average
from art_clat.training.checkpoint import Checkpoint, Keeper, Progress, fingerprint_of_state
from art_clat.training.data import ArrayBatches, Batches, GeneratorBatches, augmented
from art_clat.training.description import describe
from art_clat.training.finite import FiniteGuard
from art_clat.training.history import EpochRecord, History, SelectionRecord
from art_clat.training.objectives import (
    FIRST_STAGES,
    AsModule,
    BatchLoss,
    Objective,
    default_weight,
    make_objective,
    needs_ascent,
    objectives,
)
from art_clat.utils.checks import check_at_least, check_seed, check_share, check_whole, is_number
from art_clat.utils.descriptions import fingerprint, text_of
from art_clat.utils.modes import evaluation_mode, own_modes
from art_clat.utils.processes import Batch, Part, Ranks
from art_clat.utils.randomness import own_randomness, reseed

logger = logging.getLogger(__name__)

#: Batches between two looks, on a GPU, at whether everything is finite. A look makes the processor wait for it.
LOOK_EVERY = 50


class Preset(NamedTuple):
    """
    What the paper leaves open and the user does not say.

    :param objective: What the second stage minimises.
    :param freeze_norms: Whether the chosen layers' norms are left alone.
    """

    objective: str
    freeze_norms: bool


#: Presets by name. The default one was chosen on validation images, see evaluation/results/paper_tables.
PRESETS = {"default": Preset("adversarial", freeze_norms=True), "paper": Preset("clean", freeze_norms=False)}


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
    and hooks and the global random generators are as they were before, but for the one number that is drawn from
    NumPy's where `seed` is `None`. Gradients are dropped, and so is the optimiser's state of a layer when it is frozen:
    stale momentum must not move it when it is chosen again. Norms whose parameters were frozen before keep their
    statistics throughout.

    The first stage applies ART's preprocessing of training, the second that of prediction: an augmentation that differs
    between the clean and the perturbed pass would be measured as a feature distance.

    Launched with ``torchrun``, or within a process group of torch's, the same script trains on several processors. Each
    process takes its share of every batch, so `batch_size` is that of all together, and losses, BatchNorm statistics,
    criticality and accuracies are those of the whole batch or data set.

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
        first_stage: str = "pgd_at",
        criticality_weight: float | None = None,
        selection: str | Sequence[str] | SelectionRule = "criticality",
        budget: float | Budget = 0.05,
        reselect_every: int = 10,
        preset: str = "default",
        objective: str | None = None,
        ema_decay: float | None = None,
        head_eligible: bool = False,
        after_norm: bool = False,
        freeze_norms: bool | None = None,
        granularity: Granularity = "layer",
        predecessor: str = "execution",
        selection_samples: int = 1024,
        augmentation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        amp: bool = False,
        compile: bool = False,
        channels_last: bool = False,
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
        :param first_stage: What the warm-up trains the whole network with: ``"pgd_at"``, ``"trades"`` or ``"mart"``,
               see :mod:`art_clat.training.objectives`.
        :param criticality_weight: λ of eq. 6, at least 0: the weight of the batch mean of the chosen layers' summed
               feature distance, or of a rival objective's second term; `None` for the objective's default. The paper
               does not report it.
        :param selection: The rule that scores the layers: ``"criticality"`` (the paper's), one of its rivals
               (:func:`art_clat.selection_rules` lists them), a function of :class:`art_clat.Candidates` that gives each
               layer a score, or the names of layers that are always chosen.
        :param budget: Share of the layers that are chosen, in (0, 1]; at least one is. Or a :class:`art_clat.Budget`: a
               number of layers, or a share of the parameters.
        :param reselect_every: Number of epochs, at least 1, after which the layers are chosen again.
        :param preset: Where `objective` and `freeze_norms` come from if `None`. ``"default"``: ``"adversarial"``, norms
               frozen, which helped on validation images. ``"paper"``: ``"clean"``, norms of chosen layers trained.
        :param objective: ``"adversarial"``: cross-entropy on the attack's examples, and the feature distance at the
               same perturbations, one attack a batch. ``"clean"``: eq. 5 and 6 to the letter, clean cross-entropy, and
               the feature distance under an inner attack of its own, in the ball and with the steps of the attack of
               the PGD family passed as `attacks`, always from a random start. ``"clean_single_step"``: that inner
               attack is one step of size ε ("CLAT (fast)"). ``"relative"``: as ``"adversarial"``, each distance
               divided by the length of the feature. ``"pgd_at"``, ``"trades"``, ``"mart"``: ordinary adversarial
               training, of the chosen layers only.
        :param ema_decay: Average the weights over the steps of training with this decay, in (0, 1), e.g. 0.99; the
               average is what is validated, and what the network has at the end; that of a layer that is frozen goes
               on until it has reached its weights. `None` for no average.
        :param head_eligible: Whether the classifier head may be chosen too. Taken literally, eq. 2 and 3 nearly always
               choose it, for its few outputs.
        :param after_norm: Take the features of layers that have a norm after it, in the index and in the objective. At
               `False` they are what the convolution itself returns, the literal reading; before a BatchNorm their
               distance can shrink by the weights' scale alone, which changes nothing in what the network computes.
        :param freeze_norms: Leave a chosen layer's norm as the first stage made it, weights and running statistics, and
               train its weighted module alone: it cannot scale back then what the feature distance has shrunk. For
               layers of another `granularity` it is `False`.
        :param granularity: What counts as one layer: ``"layer"``, a weighted leaf module with the norm on its output;
               ``"block"``, timm's own grouping (``group_matcher``); or a list of module names and regular expressions
               that match whole names. Blocks and modules are trained with all their parameters.
        :param predecessor: ``"execution"``: the index compares a layer with the one that ran before, as in the paper.
               ``"input"``: with the tensor that enters it.
        :param selection_samples: Number of training samples, at least 1, that criticality is measured on; drawn once.
        :param augmentation: Transform of a training image of shape (channels, height, width), on the network's device,
               such as one of torchvision's ``transforms.v2``; applied to every image of a batch by itself, before the
               attack. It must keep within ``clip_values``. Criticality is measured on images as they are.
        :param amp: Train in bfloat16 where autocast deems it safe. Selection and validation stay in float32.
        :param compile: Run attacks on the whole network through ``torch.compile``. Passes that look at features or stop
               early are not compiled, nor is the update of the weights.
        :param channels_last: Store images and convolution weights with their channels last during ``fit``. Like the two
               before it changes results by rounding, and pays or not depending on the machine.
        :param seed: Seed of the data order, the attacks and dropout, 0 … 2**32 − 1. `None` draws one from NumPy's
               global generator, so that ``np.random.seed`` makes a run repeatable, as with ART's trainers.
        :raises TypeError: If `classifier` is not a ``PyTorchClassifier``, `attacks` no evasion attack(s), or
                `augmentation` cannot be called.
        :raises ValueError: If an argument is out of its range, the classifier has no optimiser or no weighted layer,
                or an attack is targeted, bound to another classifier, or not usable with an objective that has an inner
                attack of its own; `granularity` does not fit the network.
        """
        check_classifier(classifier, needs_optimizer=True)
        if isinstance(classifier.optimizer, torch.optim.LBFGS):
            raise ValueError("`classifier` has the optimizer LBFGS, which wants to evaluate the loss itself.")
        attack_list = attacks if isinstance(attacks, (list, tuple)) else [attacks]
        if not attack_list:
            raise ValueError("`attacks` is empty; at least one attack is needed.")
        for attack in attack_list:
            check_attack(attack, classifier, argument="attacks")
        check_share(ratio, argument="ratio")
        check_whole(warmup, 0, argument="warmup")
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(map(repr, PRESETS))}, got {preset!r}.")
        settings = PRESETS[preset]
        objective = settings.objective if objective is None else objective
        if objective not in objectives():
            raise ValueError(f"`objective` must be one of {', '.join(map(repr, objectives()))}, got {objective!r}.")
        if first_stage not in FIRST_STAGES:
            raise ValueError(f"`first_stage` must be one of {', '.join(map(repr, FIRST_STAGES))}, got {first_stage!r}.")
        if criticality_weight is None:
            criticality_weight = default_weight(objective)
        check_at_least(criticality_weight, 0, argument="criticality_weight")
        rule = as_rule(selection)
        if not isinstance(budget, Budget):
            check_share(budget, argument="budget")
        if ema_decay is not None and not (is_number(ema_decay) and 0 < ema_decay < 1):
            raise ValueError(f"`ema_decay` must be a number in (0, 1), or None, got {ema_decay!r}.")
        check_whole(reselect_every, 1, argument="reselect_every")
        check_whole(selection_samples, 1, argument="selection_samples")
        check_layers_wanted(granularity, predecessor, after_norm=after_norm)
        if freeze_norms is None:
            freeze_norms = settings.freeze_norms and granularity == "layer"
        if freeze_norms and granularity != "layer":
            raise ValueError(f"`freeze_norms` asks for `granularity='layer'`, got {granularity!r}.")
        find_groups(classifier.model, granularity)
        if seed is not None:
            check_seed(seed)
        if augmentation is not None and not callable(augmentation):
            raise TypeError(f"`augmentation` must be a transform of an image, got {type(augmentation).__name__}.")
        super().__init__(classifier, list(attack_list), ratio)
        self.warmup = int(warmup)
        self.first_stage = first_stage
        self.criticality_weight = criticality_weight
        self.selection = selection
        self.budget = budget
        self.reselect_every = int(reselect_every)
        self.objective = objective
        self.ema_decay = ema_decay
        self.head_eligible = head_eligible
        self.after_norm = after_norm
        self.freeze_norms = freeze_norms
        self.granularity = granularity if isinstance(granularity, str) else list(granularity)
        self.predecessor = predecessor
        self.selection_samples = int(selection_samples)
        self.augmentation = augmentation
        self.amp = amp
        self.compile = compile
        self.channels_last = channels_last
        self.seed = seed
        #: The record of the latest ``fit``.
        self.history = History()
        self._network = TensorClassifier(classifier)
        self._attacks = [TensorAttack(attack, self._network) for attack in attack_list]
        self._rule = rule
        self._check_inner_attacks()

    def fit(
        self,
        x: npt.NDArray[np.floating],
        y: npt.NDArray[np.generic],
        validation_data: tuple[npt.NDArray[np.floating], npt.NDArray[np.generic]] | None = None,
        batch_size: int = 128,
        nb_epochs: int = 20,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 200,
        restore_best: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Train a model adversarially with CLAT. See class documentation for more information on the exact procedure.

        Every call counts its epochs from 0, warm-up included, and begins a new :attr:`history`, unless it continues a
        run from its `checkpoint`.

        :param x: Training set, shape (n, *input_shape), floating point, within the classifier's ``clip_values``; it is
               not modified.
        :param y: Index labels, shape (n,), or one-hot labels, shape (n, nb_classes).
        :param validation_data: Tuple (x_val, y_val); clean accuracy and robust accuracy under the first attack are
               recorded after every epoch. They do not influence the training.
        :param batch_size: Size of batches, over all processes.
        :param nb_epochs: Number of epochs, those of the warm-up included.
        :param scheduler: Learning rate scheduler of the classifier's optimiser, stepped at the end of every epoch.
        :param checkpoint: Folder that the run saves itself in. If it holds a run of the same arguments, model and data,
               that run is continued; on one processor it ends with the weights it would have had without the break.
               Several processes must see the same folder.
        :param checkpoint_every: Save after so many batches within an epoch, at least 1, besides after every epoch.
        :param restore_best: End on the weights of the epoch with the highest robust accuracy on `validation_data`,
               instead of the last. With `checkpoint` they are kept as ``best.safetensors`` in any case.
        :param kwargs: ``verbose``: show a progress bar (default `True`); ``drop_last``: leave out the last batch of an
               epoch if it is smaller than the others (default `False`).
        :raises TypeError: If `kwargs` holds another option, `scheduler` is no scheduler, or the state of scheduler or
                optimiser cannot be saved without pickle.
        :raises ValueError: If the data are unusable, the optimiser does not hold a layer that may be chosen, the
                network is compiled or recomputes activations, or `checkpoint` holds another run or a damaged file.
        :raises OSError: If `checkpoint` cannot be written to.
        :raises FloatingPointError: If the loss or its gradient is not finite; the last weights seen finite stay in
                place. They are looked at after every batch, on a GPU after every fiftieth.
        :raises ConnectionError: If another process of several is lost.
        """
        options = _options(kwargs)
        check_whole(batch_size, 1, argument="batch_size")
        check_whole(nb_epochs, 1, argument="nb_epochs")
        check_whole(checkpoint_every, 1, argument="checkpoint_every")
        self._check_scheduler(scheduler)
        batch_size, nb_epochs, checkpoint_every = int(batch_size), int(nb_epochs), int(checkpoint_every)  # NumPy's too
        inputs, labels = check_data(self._classifier, x, y, argument="x", label_argument="y")
        if options["drop_last"] and len(inputs) < batch_size:
            raise ValueError(
                f"`drop_last` leaves no batch: `x` has {len(inputs)} inputs, `batch_size` is {batch_size}."
            )
        if restore_best and validation_data is None:
            raise ValueError("`restore_best` needs `validation_data` to tell which epoch is best.")
        if checkpoint is not None and (not isinstance(checkpoint, (str, os.PathLike)) or not os.fspath(checkpoint)):
            raise ValueError(f"`checkpoint` must be the path of a folder, got {checkpoint!r}.")
        validation = self._check_validation(validation_data)
        ranks = Ranks.join(self._network.device)
        with ranks.together():
            if ranks.size > 1:
                self._check_can_be_shared(ranks, len(inputs), batch_size, drop_last=options["drop_last"])
            if checkpoint is not None or ranks.size > 1:
                self._check_loss_learns_nothing()
            if checkpoint is None and ranks.size == 1:
                described: dict[str, object] = {}
            else:
                described = {
                    **{name: text_of(getattr(self, name)) for name in _ARGUMENTS},
                    "batch_size": batch_size,
                    "nb_epochs": nb_epochs,
                    "drop_last": bool(options["drop_last"]),
                    "the inputs": fingerprint(inputs),
                    "the labels": fingerprint(labels),
                    "validation_data": None if validation is None else fingerprint(*validation),
                    **describe(self._classifier, scheduler, [attack.attack for attack in self._attacks]),
                }
            model, optimizer = self._network.model, self._classifier.optimizer
            if ranks.size > 1:
                saves = {"checkpoint": checkpoint is not None, "checkpoint_every": checkpoint_every}
                state = {"the optimizer's state": fingerprint_of_state(optimizer), "restore_best": restore_best}
                ranks.check_same({**described, **saves, **state}, self._network.device)
            average = None if self.ema_decay is None else Average(model, self.ema_decay)
            keeper = Keeper(
                model,
                None if checkpoint is None else Checkpoint(checkpoint, model, optimizer, scheduler, described, average),
                every=checkpoint_every,
                keeps_best=restore_best or checkpoint is not None,
                writes=ranks.rank == 0,
            )
            batches = ArrayBatches(
                inputs, labels, batch_size=batch_size, drop_last=options["drop_last"], device=self._network.device
            )
            self._train(batches, validation, nb_epochs, scheduler, keeper, average, ranks, verbose=options["verbose"])
        if restore_best:
            keeper.restore_best()

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
        check_whole(nb_epochs, 1, argument="nb_epochs")
        self._check_scheduler(scheduler)
        ranks = Ranks.join(self._network.device)
        if ranks.size > 1:
            raise ValueError(
                f"`fit_generator` trains in one process, of which there are {ranks.size}: a generator has no share for "
                "each. Use `fit`."
            )
        batches = GeneratorBatches(generator, self._classifier)
        validation = self._check_validation(validation_data)
        model = self._network.model
        average = None if self.ema_decay is None else Average(model, self.ema_decay)
        self._train(
            batches, validation, nb_epochs, scheduler, Keeper(model), average, ranks, verbose=options["verbose"]
        )

    def _train(
        self,
        batches: Batches,
        validation: tuple[torch.Tensor, torch.Tensor] | None,
        nb_epochs: int,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        keeper: Keeper,
        average: Average | None,
        ranks: Ranks,
        *,
        verbose: bool,
    ) -> None:
        """Run the procedure of the paper: adversarial training, then rounds of selection and fine-tuning."""
        network = self._network
        network.ranks = ranks
        drawn = self._draw_seed()
        resumed = keeper.resume()
        progress = resumed or Progress(seed=drawn)
        if resumed is not None and ranks.rank == 0:
            stands = "is finished" if progress.epoch >= nb_epochs else f"goes on at epoch {progress.epoch}"
            logger.info("The checkpoint's run %s; its weights take the place of those at hand.", stands)
        ranks.check_same({"the checkpoint": (progress.epoch, progress.batch, progress.seed)}, network.device)
        with own_randomness(progress.seed, network.device):
            sample = batches.sample(self.selection_samples, ranks)
            layers = network.find_layers(batches.example(), after_norm=self.after_norm, granularity=self.granularity)
        if self.freeze_norms:
            layers = [replace(layer, modules=layer.modules[:1]) for layer in layers]
        eligible = eligible_layers(layers, head_eligible=self.head_eligible)
        check_names(self.selection, eligible)
        self._check_budget(eligible)
        self._check_optimizer(None if self.warmup else eligible)
        self.history = history = progress.history
        with self._as_guest(progress.seed) as freeze, self._accelerated():
            keeper.save(progress)  # a scheduler that cannot be saved is refused before any work is done
            stage = self._begin(None if progress.chosen is None else _named(layers, progress.chosen), freeze)
            if average is not None and resumed is None:
                average.begin()  # now that all processes have the first one's weights
            with tqdm(
                initial=progress.epoch, total=nb_epochs, unit="epoch", disable=not verbose or ranks.rank > 0
            ) as bar:
                while progress.epoch < nb_epochs:
                    rounds, rest = divmod(progress.epoch - self.warmup, self.reselect_every)
                    if rounds >= 0 and rest == 0 and progress.batch == 0:
                        chosen = self._select(progress, layers, eligible, sample)
                        stage = self._begin(chosen, freeze)
                    bar.set_description(stage.name)
                    self._train_epoch(progress, batches, stage, keeper, average)
                    if scheduler is not None:
                        scheduler.step()
                    if validation is not None:
                        with nullcontext() if average is None else average.applied():
                            history.add_validation(*self._validate(*validation, seed=progress.seed))
                            keeper.consider(history.epochs[-1])
                    progress.begin_epoch(progress.epoch + 1)
                    keeper.save(progress)
                    bar.update()
                    bar.set_postfix(_summary(history.epochs[-1]))
                    logger.debug("%s", history.epochs[-1])
            if average is not None:
                average.apply()

    def _begin(self, chosen: list[Layer] | None, freeze: Callable[[list[Layer]], None]) -> _Stage:
        """Begin to train the whole network, or the chosen layers alone."""
        if chosen is None:
            objective = FIRST_STAGES[self.first_stage](self._network)
        else:
            freeze(chosen)
            objective = make_objective(self.objective, self._network, chosen, self.criticality_weight)
        return _Stage(chosen, objective, self._network.ranks.wrap(AsModule(self._network.model, objective)))

    def _select(
        self,
        progress: Progress,
        layers: list[Layer],
        eligible: list[Layer],
        sample: list[Batch],
    ) -> list[Layer]:
        """Measure every layer (eq. 2, 3) and choose the most critical ones, or those that another rule prefers."""
        start = time.perf_counter()
        candidates = Candidates(
            self._network,
            layers,
            eligible,
            sample,
            self._attacks[0],
            seed=progress.seed,
            round=len(self.history.selections),
            predecessor=self.predecessor,
        )
        with own_randomness(progress.seed, self._network.device), self._network.in_float32():
            measured = candidates.criticality
            chosen = choose(self._rule, candidates, self._budget)
        parameters = {p for layer in chosen for p in layer.parameters() if p in self._trainable}
        record = SelectionRecord(
            epoch=progress.epoch,
            measured=measured,
            chosen=tuple(layer.name for layer in chosen),
            trainable_parameters=sum(p.numel() for p in parameters),
            total_parameters=sum(p.numel() for p in self._network.model.parameters()),
            seconds=time.perf_counter() - start,
        )
        self.history.selections.append(record)
        progress.chosen = list(record.chosen)
        logger.log(
            logging.INFO if self._network.ranks.rank == 0 else logging.DEBUG,
            "CLAT, epoch %d: training %d of %d layers (%s), %s of %s parameters (%.2f %%).",
            progress.epoch,
            len(chosen),
            len(layers),
            ", ".join(record.chosen),
            f"{record.trainable_parameters:,}",
            f"{record.total_parameters:,}",
            100 * record.trainable_parameters / record.total_parameters,
        )
        return chosen

    def _train_epoch(
        self, progress: Progress, batches: Batches, stage: _Stage, keeper: Keeper, average: Average | None
    ) -> None:
        """Train one epoch, or what is left of it, and record it."""
        epoch, seed, device, ranks = progress.epoch, progress.seed, self._network.device, self._network.ranks
        start = time.perf_counter() - progress.seconds
        learning_rate = float(self._classifier.optimizer.param_groups[0]["lr"])
        guard = FiniteGuard(self._network.model, every=LOOK_EVERY if device.type == "cuda" else 1, ranks=ranks)
        sums = torch.zeros(5, dtype=torch.float64, device=device)

        def catch_up(done: int) -> None:
            guard.after_step(look=True)
            progress.batch = done
            progress.seconds = time.perf_counter() - start
            progress.sums = [one + more for one, more in zip(progress.sums, ranks.sum(sums).tolist(), strict=True)]
            sums.zero_()

        reseed(device, seed, epoch)
        for batch, (x, y, part) in enumerate(batches.epoch(progress.batch, ranks), start=progress.batch):
            x, y = self._prepare(x, part, seed, epoch, batch), y.to(device)
            reseed(device, seed, epoch, batch)
            attack = self._attacks[(epoch * batches.nb_batches + batch) % len(self._attacks)]
            x_adv = self._perturb(stage.objective, attack, x, y, part)
            if ranks.size > 1:  # dropout must not leave out the same units everywhere
                reseed(device, seed, epoch, batch, 0, ranks.rank)
            self._set_modes(stage.chosen)
            try:
                loss = self._step(stage, guard, x, x_adv, y, part)
                if average is not None:
                    average.update(epoch * batches.nb_batches + batch)
                correct = (loss.logits.argmax(dim=1) == self._network.one_hot(y).argmax(dim=1)).float().mean()
                means = [
                    loss.loss.detach(),
                    loss.cross_entropy,
                    loss.criticality_loss,
                    correct,
                    torch.ones_like(correct),
                ]
                sums += len(x) * torch.stack(means)
                if keeper.is_due(batch + 1) and batch + 1 < batches.nb_batches:
                    catch_up(batch + 1)
                    keeper.save(progress)
                elif batch + 1 == batches.nb_batches:
                    catch_up(batch + 1)
            except FloatingPointError as error:
                self._classifier.optimizer.state.clear()  # it may have become infinite too
                raise FloatingPointError(
                    f"{error} in epoch {epoch}, batch {batch}. The likely cause is a learning rate (now "
                    f"{learning_rate:g}) or a `criticality_weight` ({self.criticality_weight:g}) that is too large. "
                    "The last finite weights are in place."
                ) from None
        *totals, nb_samples = progress.sums
        mean_loss, cross_entropy, criticality_loss, accuracy = (total / nb_samples for total in totals)
        robust = stage.objective.logits_are_adversarial
        self.history.epochs.append(
            EpochRecord(
                epoch=epoch,
                stage="adversarial training" if stage.chosen is None else "clat",
                loss=mean_loss,
                cross_entropy=cross_entropy,
                criticality_loss=criticality_loss,
                learning_rate=learning_rate,
                seconds=progress.seconds,
                train_clean_accuracy=None if robust else accuracy,
                train_robust_accuracy=accuracy if robust else None,
            )
        )

    def _prepare(self, x: torch.Tensor, part: Part, *counters: int) -> torch.Tensor:
        """Bring a batch to the device, augmented and stored as it is going to be used."""
        x = x.to(self._network.device)
        if self.augmentation is not None:
            x = augmented(self.augmentation, x, part, *counters)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x

    def _perturb(
        self, objective: Objective, attack: TensorAttack, x: torch.Tensor, y: torch.Tensor, part: Part
    ) -> torch.Tensor:
        """Perturb the share `ratio` of a batch, drawn at random."""
        if self.ratio == 1:
            return objective.perturb(attack, x, y, part)
        drawn = torch.randperm(part.total)[: int(np.ceil(self.ratio * part.total))]
        place = torch.full((part.total,), -1)
        place[drawn] = torch.arange(len(drawn))
        here = place[part.mine]  # where each sample of this process is among those drawn
        perturbed = torch.nonzero(here >= 0)[:, 0]
        x_adv = x.clone()
        if len(perturbed):
            among, indices = Part(len(drawn), here[perturbed].to(x.device)), perturbed.to(x.device)
            x_adv[indices] = objective.perturb(attack, x[indices], y[indices], among)
        return x_adv

    def _step(
        self, stage: _Stage, guard: FiniteGuard, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor, part: Part
    ) -> BatchLoss:
        """Make one optimiser step on the objective, which moves what is not frozen."""
        optimizer = self._classifier.optimizer
        optimizer.zero_grad()
        try:
            with self._network.shared():
                loss = BatchLoss(*stage.loss(x, x_adv, y))
        except ValueError as error:
            if len(x) == 1 and "more than 1 value per channel" in str(error):
                raise ValueError(
                    "A batch of one sample cannot pass a BatchNorm in training: use another `batch_size`, or "
                    "`drop_last=True` in `fit`."
                ) from error
            raise
        guard.before_step(loss.loss)
        # Gradients are averaged over processes, whose parts of a batch may differ by one sample.
        (loss.loss * (self._network.ranks.size * len(x) / part.total)).backward()
        optimizer.step()
        guard.after_step()
        return loss

    def _set_modes(self, chosen: list[Layer] | None) -> None:
        if chosen is None:
            train_all(self._network.model)
        else:
            train_only(self._network.model, chosen)

    def _validate(self, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> tuple[float, float]:
        """Give clean accuracy and robust accuracy under the first attack."""
        network = self._network
        correct = torch.zeros(2, dtype=torch.int64, device=network.device)
        with own_randomness(seed, network.device), evaluation_mode(network.model), network.in_float32():
            for inputs, target in zip(x.split(256), y.split(256), strict=True):
                part = network.ranks.part(len(inputs))
                if len(inputs[part.mine]) == 0:
                    continue
                clean, target = inputs[part.mine].to(network.device), target[part.mine].to(network.device)
                labels = network.one_hot(target).argmax(dim=1)
                robust = self._attacks[0](clean, target, part)
                with torch.no_grad():
                    for row, batch in enumerate((clean, robust)):
                        correct[row] += (network.logits(batch).argmax(dim=1) == labels).sum()
        clean_accuracy, robust_accuracy = (network.ranks.sum(correct).double() / len(x)).tolist()
        return clean_accuracy, robust_accuracy

    def _draw_seed(self) -> int:
        if self.seed is not None:
            return int(self.seed)
        drawn = torch.tensor(int(np.random.randint(2**32, dtype=np.uint64)), device=self._network.device)
        return int(self._network.ranks.first(drawn))

    def _accelerated(self) -> AbstractContextManager[None]:
        return self._network.accelerated(amp=self.amp, compile=self.compile, channels_last=self.channels_last)

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
            stack.callback(setattr, self._network, "ranks", Ranks())  # what holds a group keeps its threads alive
            freezing = stack.enter_context(ExitStack())

            def freeze(chosen: list[Layer]) -> None:
                freezing.close()
                freezing.enter_context(only_trainable(self._network.model, chosen))
                model.zero_grad()  # an optimiser passes over what has no gradient, whatever its momentum and decay
                for parameter in self._trainable:
                    if not parameter.requires_grad:
                        optimizer.state.pop(parameter, None)

            yield freeze

    def _check_loss_learns_nothing(self) -> None:
        loss = self._classifier.loss
        names = [name for name, _ in loss.named_parameters()] if isinstance(loss, nn.Module) else []
        if names:
            raise ValueError(
                f"`classifier.loss` has parameters of its own ({', '.join(names)}) that are neither saved nor shared; "
                "`checkpoint` and several processes need a loss without."
            )

    def _check_can_be_shared(self, ranks: Ranks, nb_samples: int, batch_size: int, *, drop_last: bool) -> None:
        """Refuse what several processes would compute otherwise than one."""
        last = 0 if drop_last else nb_samples % batch_size
        if min(batch_size, nb_samples, last or batch_size) < ranks.size:
            raise ValueError(
                f"`batch_size` {batch_size} leaves a batch of {last or batch_size} of {nb_samples} inputs, fewer than "
                f"the {ranks.size} processes: choose another `batch_size`, or `drop_last=True`."
            )
        loss = self._classifier.loss
        if getattr(loss, "reduction", None) != "mean" or getattr(loss, "weight", None) is not None:
            raise ValueError(
                f"`classifier.loss` is {loss} with reduction {getattr(loss, 'reduction', None)!r}; on several "
                "processes it must be a mean over the samples: `reduction='mean'`, and no class weights."
            )
        if 0 <= getattr(loss, "ignore_index", -1) < self._network.nb_classes:
            raise ValueError(
                f"`classifier.loss` ignores the class {loss.ignore_index}, so its mean is over fewer samples in one "
                "process than in another; several processes need all samples to count."
            )
        for name, module in self._network.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(f"`classifier.model`: {name} has no running statistics; several processes need them.")
            if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
                raise ValueError(
                    f"`classifier.model`: {name} keeps running statistics of single samples, which are not shared; "
                    "several processes need an InstanceNorm with `track_running_stats=False`."
                )

    @property
    def _budget(self) -> Budget:
        return self.budget if isinstance(self.budget, Budget) else Budget(share=self.budget)

    def _check_budget(self, eligible: list[Layer]) -> None:
        if self.selection == "all" or isinstance(self.selection, (list, tuple)):
            return  # chosen whatever the budget
        if not self._budget.fits_any(eligible, sum(p.numel() for p in self._network.model.parameters())):
            smallest = min(eligible, key=lambda layer: layer.nb_parameters)
            raise ValueError(
                f"`budget` {self.budget} pays for no layer: the smallest that may be chosen, {smallest.name}, has "
                f"{smallest.nb_parameters:,} parameters."
            )

    def _check_inner_attacks(self) -> None:
        first = FIRST_STAGES[self.first_stage](self._network).needs_ascent
        for argument, name, needed in (
            ("first_stage", self.first_stage, first),
            ("objective", self.objective, needs_ascent(self.objective)),
        ):
            if needed and any(attack.ascent is None for attack in self._attacks):
                kinds = ", ".join(type(attack.attack).__name__ for attack in self._attacks)
                raise ValueError(
                    f"`{argument}={name!r}` takes the ball and the steps of its inner attack from `attacks`: "
                    "ProjectedGradientDescent, BasicIterativeMethod or FastGradientMethod in the norm inf, 2 or 1 on a "
                    f"classifier whose preprocessing is PyTorch's are accepted, got {kinds}. "
                    "`objective='adversarial'` takes any attack."
                )

    def _check_scheduler(self, scheduler: object) -> None:
        if scheduler is None:
            if all(group["lr"] == 0 for group in self._classifier.optimizer.param_groups):
                raise ValueError(
                    "`classifier.optimizer` has the learning rate 0, where ART's fast-is-better-than-free trainer "
                    "leaves it, and there is no `scheduler` to raise it: nothing would be trained."
                )
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
        self, validation_data: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if validation_data is None:
            return None
        if not isinstance(validation_data, (tuple, list)) or len(validation_data) != 2:
            raise ValueError(f"`validation_data` must be a tuple (x_val, y_val), got {type(validation_data).__name__}.")
        return check_data(
            self._classifier, *validation_data, argument="validation_data[0]", label_argument="validation_data[1]"
        )

    def _check_optimizer(self, layers: list[Layer] | None) -> None:
        if layers is None:  # the whole network, by the names of the modules that own the parameters
            parameters = self._network.model.named_parameters()
            named = [(name.rpartition(".")[0] or name, parameter) for name, parameter in parameters]
        else:
            named = [(layer.name, parameter) for layer in layers for parameter in layer.parameters()]
        check_optimizer_holds(self._classifier.optimizer, named)


@dataclass(frozen=True)
class _Stage:
    """What is trained, and on what: the whole network, or the layers chosen last."""

    chosen: list[Layer] | None
    objective: Objective
    loss: nn.Module

    @property
    def name(self) -> str:
        return "adversarial training" if self.chosen is None else "CLAT"


#: What :class:`AdversarialTrainerCLATPyTorch` is made with, besides classifier and attacks.
_ARGUMENTS = (
    "ratio",
    "warmup",
    "first_stage",
    "criticality_weight",
    "selection",
    "budget",
    "reselect_every",
    "objective",
    "ema_decay",
    "head_eligible",
    "after_norm",
    "freeze_norms",
    "granularity",
    "predecessor",
    "selection_samples",
    "augmentation",
    "amp",
    "compile",
    "channels_last",
    "seed",
)


def _named(layers: list[Layer], names: list[str]) -> list[Layer]:
    return [layer for layer in layers if layer.name in names]


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
