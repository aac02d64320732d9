"""Criticality-Leveraged Adversarial Training (CLAT) as an ART trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from art.attacks import EvasionAttack
from art.data_generators import DataGenerator
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier

from art_clat.config import (
    Budget,
    FitOptions,
    Granularity,
    LayerOptions,
    PerformanceOptions,
    ReuseOptions,
    RuleLike,
    SelectionOptions,
    TrainerOptions,
    preset_values,
)
from art_clat.layers.groups import find_groups
from art_clat.models.checks import check_attacks, check_classifier, check_data
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.selection.rules import as_rule
from art_clat.training.checks import check_inner_attacks, check_loss, check_validation
from art_clat.training.data import ArrayBatches, Batches, GeneratorBatches
from art_clat.training.history import History
from art_clat.training.loop import TrainingLoop
from art_clat.training.objectives import find_objective
from art_clat.training.schedule import Schedule
from art_clat.training.setup import make_keeper
from art_clat.utils.checks import check_not_in_inference_mode
from art_clat.utils.processes import Ranks

Arrays = tuple[npt.NDArray[np.floating], npt.NDArray[np.generic]]
#: One of torch's schedulers or of timm's, which have no base class in common.
Scheduler = Any


class AdversarialTrainerCLATPyTorch(AdversarialTrainer):  # type: ignore[misc]
    """
    Criticality-Leveraged Adversarial Training, CLAT (Gopal et al., ICML 2025).

    | Paper link: https://arxiv.org/abs/2408.10204

    1. For `warmup` epochs the whole network is trained adversarially on the attack's examples.
    2. Every `reselect_every` epochs after that, the criticality index of every layer is measured (eq. 2 and 3) and the
       layers with the largest are chosen. Everything else is frozen: parameters, BatchNorm statistics, dropout.
    3. Each batch then moves the chosen layers only. Their loss is the cross-entropy plus `criticality_weight` times the
       distance of their features under attack (eq. 5 and 6).

    Nothing is added to the network. After ``fit``, even if it raised, ``requires_grad`` flags, training modes, hooks
    and the global random generators are as before, except that NumPy's has drawn one number if `seed` is `None`.
    Gradients are dropped, and so is the optimiser's state of a layer when it is frozen. The first stage applies ART's
    preprocessing of training, the second that of prediction: an augmentation that differs between the clean and the
    perturbed pass would be measured as a feature distance.

    Launched with ``torchrun``, or within a torch process group, the same script trains on several processors. Each
    process takes its share of every batch, so `batch_size` counts the samples of all. Losses, BatchNorm statistics,
    criticality and accuracies are computed over the whole batch or data set. Each process needs a sample of a batch.

    | Please keep in mind the limitations of defences: very careful evaluations are required to assess the effectiveness
        of adversarial training case by case (see https://arxiv.org/abs/1902.06705).
    """

    #: The class that trains. Set it to a subclass to change a step of the procedure.
    loop_class: type[TrainingLoop] = TrainingLoop

    def __init__(
        self,
        classifier: PyTorchClassifier,
        attacks: EvasionAttack | list[EvasionAttack],
        ratio: float = 1.0,
        *,
        warmup: int = 0,
        first_stage: str = "pgd_at",
        objective: str | None = None,
        criticality_weight: float | None = None,
        weight_perturbation: float | None = None,
        selection: SelectionOptions | RuleLike | None = None,
        budget: float | Budget = 0.05,
        reselect_every: int = 10,
        layers: LayerOptions | Granularity = "layer",
        augmentation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        ema_decay: float | None = None,
        reuse_perturbations: ReuseOptions | int | str | None = None,
        performance: PerformanceOptions = PerformanceOptions(),
        preset: str = "default",
        seed: int | None = None,
    ) -> None:
        """
        Create an :class:`.AdversarialTrainerCLATPyTorch` instance.

        :param classifier: Model to train, with an optimiser that holds its parameters.
        :param attacks: Untargeted attack(s) on `classifier`. Several take turns over the batches; the first one
               measures criticality and robust validation accuracy. The PGD family runs in torch on the classifier's
               device, other attacks through their ``generate``.
        :param ratio: The share of each batch to perturb, in (0, 1].
        :param warmup: Number of epochs of adversarial training of the whole network at the beginning of ``fit``. At 0
               the network should already be adversarially trained.
        :param first_stage: The warm-up's objective: ``"pgd_at"``, ``"trades"``, ``"mart"``, ``"awp"`` or ``"fgsm_rs"``.
        :param objective: What the second stage minimises over the chosen layers: a name of
               :func:`art_clat.list_objectives`, or `None` for the preset's. ``"adversarial"``: cross-entropy and
               feature distance on the attack's examples. ``"clean"``: eq. 5 and 6 to the letter.
        :param criticality_weight: λ of eq. 6, at least 0: the weight of the batch mean of the chosen layers' summed
               feature distance, or of a rival objective's second term. `None` for the objective's default. The distance
               grows with a feature's size, so a value does not transfer to another network.
        :param weight_perturbation: γ of AWP (arXiv 2004.05884), at least 0: the second stage takes each step's gradient
               where every trained weight tensor has moved by γ times its length along its gradient. The first stage
               does so with ``"awp"``, at 0.01 if γ is 0. `None` for the preset's.
        :param selection: The rule that scores the layers: ``"criticality"`` (the paper's), another name of
               :func:`art_clat.list_selection_rules`, a function of :class:`art_clat.Candidates`, names of layers that
               are always chosen, or :class:`art_clat.SelectionOptions`. `None` for the preset's.
        :param budget: Share of the layers that are chosen, in (0, 1]; or a :class:`art_clat.Budget`.
        :param reselect_every: Number of epochs, at least 1, after which the layers are chosen again.
        :param layers: What counts as one layer: ``"layer"``, ``"block"``, a list of module names and regular
               expressions, or :class:`art_clat.LayerOptions`.
        :param augmentation: Transform of one training image, shape (channels, height, width), on the network's device,
               such as one of torchvision's ``transforms.v2``. It is applied to every image separately, before the
               attack, and must keep within ``clip_values``. Criticality is measured on images without it.
        :param ema_decay: Average the weights over the steps of training with this decay, in (0, 1), e.g. 0.99. The
               average is validated, and the network ends with it. The average of a frozen layer keeps moving until it
               equals the layer's weights. `None` for no average.
        :param reuse_perturbations: Begin each attack of the second stage where the last epoch's attack on the image
               ended, and make so many steps of ε/2, at least 1; :class:`art_clat.ReuseOptions` also sets their size. An
               image's first visit runs the full attack. `None`: the full attack in every epoch. ``"auto"``: one step
               if perturbations can be reused, otherwise the full attack, and the log says why.
        :param performance: Mixed precision, compilation and memory format, :class:`art_clat.PerformanceOptions`.
        :param preset: Sets what is `None`. ``"default"``: ``"adversarial"``, ``"criticality"``, γ = 0, norms frozen.
               ``"paper"``: ``"clean"``, norms of chosen layers trained. ``"safer"``: ``"pgd_at"``, ``"sharpness"``,
               γ = 0.01 (SAFER, arXiv 2501.01529).
        :param seed: Seed of the data order, the attacks and dropout, 0 … 2**32 − 1. `None` draws one from NumPy's
               global generator, so that ``np.random.seed`` makes a run repeatable, as with ART's trainers.
        :raises TypeError: If `classifier` is not a ``PyTorchClassifier``, `attacks` are not evasion attacks, or an
                option is of the wrong kind.
        :raises ValueError: If an option is out of its range; the classifier has no optimiser or no weighted layer; an
                attack is targeted, bound to another classifier, or cannot climb the objective's inner loss; or `layers`
                do not fit the network.
        """
        check_classifier(classifier, needs_optimizer=True)
        attack_list = check_attacks(attacks, classifier)
        given = {"objective": objective, "selection": selection, "weight_perturbation": weight_perturbation}
        from_preset = preset_values(preset, LayerOptions.of(layers), **given)
        default_weight = find_objective(from_preset["objective"]).default_weight
        #: All options, with the values that were left at `None` filled in.
        self.options = TrainerOptions(
            ratio=ratio,
            warmup=warmup,
            first_stage=first_stage,
            criticality_weight=default_weight if criticality_weight is None else criticality_weight,
            budget=Budget.of(budget),
            reselect_every=reselect_every,
            **from_preset,
            augmentation=augmentation,
            ema_decay=ema_decay,
            reuse_perturbations=ReuseOptions.of(reuse_perturbations),
            performance=performance,
            seed=seed,
        )
        as_rule(self.options.selection.rule)
        find_groups(classifier.model, self.options.layers.granularity)
        check_inner_attacks(self.options, attack_list, TensorClassifier(classifier))
        super().__init__(classifier, attack_list, ratio)
        #: The record of the latest ``fit``.
        self.history = History()
        self._kept: dict[str, Any] | None = {}  # what `resume=True` goes on with; None after a call without it
        self._said: set[str] = set()  # warnings that are not repeated when `fit` is called again

    @property
    def ratio(self) -> float:
        """The proportion of samples in each batch to be perturbed, in (0, 1]."""
        return self.options.ratio

    @ratio.setter
    def ratio(self, ratio: float) -> None:
        self.options = replace(self.options, ratio=ratio)

    def __repr__(self) -> str:
        options = self.options
        return (
            f"{type(self).__name__}(warmup={options.warmup}, first_stage={options.first_stage!r}, "
            f"objective={options.objective!r}, selection={options.selection.rule!r}, budget={options.budget})"
        )

    def fit(
        self,
        x: npt.NDArray[np.floating],
        y: npt.NDArray[np.generic],
        validation_data: Arrays | None = None,
        batch_size: int = 128,
        nb_epochs: int = 20,
        scheduler: Scheduler = None,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 200,
        restore_best: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Train a model adversarially with CLAT. See class documentation for more information on the exact procedure.

        Every call counts its epochs from 0, warm-up included, and begins a new :attr:`history`, unless it goes on with
        a run: that in its `checkpoint`, or with ``resume=True`` that of the latest call.

        :param x: Training set, shape (n, *input_shape), floating point, within the classifier's ``clip_values``; it is
               not modified.
        :param y: Index labels, shape (n,), or one-hot labels, shape (n, nb_classes).
        :param validation_data: Tuple (x_val, y_val). Clean accuracy, and robust accuracy under the first attack, are
               recorded after every epoch. Only a `scheduler` that waits for a plateau lets them influence the training.
        :param batch_size: Size of batches, over all processes.
        :param nb_epochs: Number of epochs, those of the warm-up included.
        :param scheduler: Learning rate scheduler of the classifier's optimiser, torch's or timm's, stepped after every
               epoch or batch (``scheduler_step``). Those that wait for a plateau get the robust accuracy.
        :param checkpoint: Folder to save the run in. If it holds a run with the same arguments, model and data, that
               run goes on to `nb_epochs`; on one processor it ends with the weights of a run without a break. Resuming
               cannot detect a changed function: after a change of a ``LambdaLR`` or the augmentation, use a new folder.
               Several processes must see the same folder. A loss with parameters is refused. An attack, augmentation or
               module that draws from its own random generator does not repeat its numbers.
        :param checkpoint_every: Number of batches within an epoch after which to save, at least 1. The run is also
               saved after every epoch.
        :param restore_best: End with the weights of the epoch with the highest robust accuracy on `validation_data`
               instead of the last. With `checkpoint` they are kept as ``best.safetensors`` in any case.
        :param kwargs: Options that :class:`art_clat.FitOptions` documents: ``callbacks``, ``validate_every``,
               ``scheduler_step``, ``max_grad_norm``, ``resume``, ``drop_last`` and ``verbose``.
        :raises TypeError: If `kwargs` holds another option, `scheduler` is no scheduler, or the state of scheduler or
                optimiser cannot be saved without pickle.
        :raises ValueError: If the data are unusable, the optimiser does not hold a layer that may be chosen, the
                schedule does not fit the run, the network is compiled or recomputes activations, or `checkpoint` holds
                another run or a damaged file.
        :raises OSError: If `checkpoint` cannot be written to.
        :raises FloatingPointError: If the loss or its gradient is not finite; the last finite weights are restored.
                This is checked after every batch, on a GPU after every fiftieth.
        :raises ConnectionError: If one of several processes is lost.
        """
        fit = FitOptions.of(
            kwargs,
            *("callbacks", "validate_every", "scheduler_step", "max_grad_norm", "resume", "drop_last", "verbose"),
            batch_size=batch_size,
            nb_epochs=nb_epochs,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            restore_best=restore_best,
        )
        data = check_data(self._classifier, x, y, argument="x", label_argument="y")
        device = torch.device(self._classifier.device)
        fit.check_data(len(data[0]), has_validation=validation_data is not None)
        batches = ArrayBatches(*data, batch_size=fit.batch_size, drop_last=fit.drop_last, device=device)
        self._run(fit, batches, data, validation_data, scheduler)

    def fit_generator(
        self,
        generator: DataGenerator,
        nb_epochs: int = 20,
        scheduler: Scheduler = None,
        validation_data: Arrays | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Train a model adversarially with CLAT using a data generator. See class documentation for more information.

        There is no checkpoint, because the order of a generator's data is unknown, and only one process, because its
        data cannot be shared out.

        :param generator: Data generator; an epoch is ``ceil(generator.size / generator.batch_size)`` batches.
        :param nb_epochs: Number of epochs, those of the warm-up included.
        :param scheduler: As in :meth:`fit`.
        :param validation_data: As in :meth:`fit`.
        :param kwargs: As in :meth:`fit`, without ``drop_last``.
        :raises TypeError: If `generator` is no ART data generator; otherwise as in :meth:`fit`.
        :raises ValueError: If the generator's size is unknown; otherwise as in :meth:`fit`, even within an epoch if a
                later batch is unusable.
        :raises FloatingPointError: As in :meth:`fit`.
        """
        accepted = ("callbacks", "validate_every", "scheduler_step", "max_grad_norm", "verbose")
        fit = FitOptions.of(kwargs, *accepted, batch_size=1, nb_epochs=nb_epochs)
        fit.check_data(None, has_validation=validation_data is not None)
        self._run(fit, GeneratorBatches(generator, self._classifier), None, validation_data, scheduler)

    def _run(self, fit: FitOptions, batches: Batches, data: Any, validation_data: object, scheduler: Scheduler) -> None:
        """Run the training loop; its record is kept even if it raises. `data` are `None` for a generator."""
        check_not_in_inference_mode("fit")
        check_loss(self._classifier)
        estimator, has_validation = self._classifier, validation_data is not None
        schedule = Schedule.of(
            scheduler, estimator.optimizer, fit=fit, nb_batches=batches.nb_batches, has_validation=has_validation
        )
        validation = check_validation(estimator, validation_data)
        ranks = Ranks.join(torch.device(estimator.device))
        kept = self._kept if fit.resume and fit.checkpoint is None else None
        parts: dict[str, Any] = {"fit": fit, "validation": validation, "schedule": schedule, "ranks": ranks}
        with ranks.together():
            attacks = check_attacks(self.attacks, estimator)
            keeper = make_keeper(estimator, attacks, options=self.options, data=data, kept=kept, **parts)
            loop = self.loop_class(
                estimator=estimator,
                attacks=attacks,
                options=self.options,
                batches=batches,
                keeper=keeper,
                said=self._said,
                **parts,
            )
            with torch.enable_grad(), keeper.held():
                loop.prepare()
                self.history, self._kept = loop.history, kept
                loop.run()
