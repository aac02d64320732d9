"""The options of training and measurement: each one is named, documented and validated here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from art_clat.utils.checks import check_at_least, check_choice, check_seed, check_share, check_whole, is_number
from art_clat.utils.descriptions import text_of

#: ``"layer"``, ``"block"``, or names of modules and regular expressions.
Granularity = str | Sequence[str]

#: The name of a rule, names of layers that are always chosen, or a function that scores the layers.
RuleLike = str | Sequence[str] | Callable[[Any], Sequence[float]]


@dataclass(frozen=True)
class LayerOptions:
    """
    What counts as one layer of the network, where its feature is taken, and what is frozen with it.

    Position tables and scales are not layers. The second stage freezes them unless their block is chosen.

    :param granularity: ``"layer"``: each weighted module without weighted children, with the norm on its output.
           ``"block"``: the groups that timm makes of a model's parameters (``group_matcher``). Or a list of module
           names and regular expressions that match whole names: each module that matches is one layer, trained with all
           its parameters, and its feature is the first tensor with a batch that it returns.
    :param predecessor: What ``F_{i−1}`` of eq. 3 is. ``"execution"``: the layer that ran before, as in the paper.
           ``"input"``: the tensor that enters the layer. They differ unless the network is a chain.
    :param after_norm: Take the feature after the layer's norm, if it has one. Before a BatchNorm the distance can
           shrink by the scale of the weights alone, which does not change what the network computes.
    :param freeze_norms: Keep weights and running statistics of a chosen layer's norm as the first stage left them. The
           norm then cannot undo what the feature distance has shrunk. `None` for the preset's choice. Needs
           ``granularity="layer"``; a measurement does not use it.
    :param head_eligible: Whether the classifier head may be chosen. Eq. 3 nearly always chooses it, because it has few
           outputs. A measurement does not use it.
    :raises TypeError: If `granularity` is neither a string nor a list of strings.
    :raises ValueError: If a value is not one of the above, or two options exclude one another.
    """

    granularity: Granularity = "layer"
    predecessor: str = "execution"
    after_norm: bool = False
    freeze_norms: bool | None = None
    head_eligible: bool = False

    def __post_init__(self) -> None:
        accepted = "`granularity` must be 'layer', 'block' or a list of module names and regular expressions"
        if isinstance(self.granularity, str):
            if self.granularity not in ("layer", "block"):
                raise ValueError(
                    f"{accepted}, got {self.granularity!r}; for a single module pass [{self.granularity!r}]."
                )
        elif not isinstance(self.granularity, Sequence) or not all(isinstance(e, str) for e in self.granularity):
            raise TypeError(f"{accepted}, got {self.granularity!r}.")
        else:
            object.__setattr__(self, "granularity", tuple(self.granularity))
        check_choice(self.predecessor, ("execution", "input"), argument="predecessor")
        for argument in ("after_norm", "freeze_norms"):
            if getattr(self, argument) and self.granularity != "layer":
                raise ValueError(
                    f"`{argument}` needs `granularity='layer'`, got {self.granularity!r}: the feature of a block or a "
                    "module is what it returns, and its norms are trained with it."
                )

    @classmethod
    def of(cls, layers: LayerOptions | Granularity) -> LayerOptions:
        """Return the options; shorthand is the granularity alone."""
        return layers if isinstance(layers, LayerOptions) else cls(granularity=layers)


@dataclass(frozen=True)
class SelectionOptions:
    """
    By which rule layers are chosen, and on how many samples they are measured.

    :param rule: ``"criticality"`` (the paper's), another name of :func:`art_clat.list_selection_rules`, a function of
           :class:`art_clat.Candidates` that returns one score a layer, or names of layers that are always chosen.
    :param samples: Number of training samples that a selection measures, at least 1; they are drawn once a run. `None`:
           1024, or as many as a third of an epoch's time allows, if that is fewer.
    :raises TypeError: If `rule` is none of these.
    :raises ValueError: If `samples` is out of its range.
    """

    rule: RuleLike = "criticality"
    samples: int | None = None

    def __post_init__(self) -> None:
        names = isinstance(self.rule, (list, tuple)) and self.rule and all(isinstance(n, str) for n in self.rule)
        if not (isinstance(self.rule, str) or names or callable(self.rule)):
            raise TypeError(
                f"`selection` must be the name of a rule, a list of layer names, or a function, got {self.rule!r}."
            )
        if self.samples is not None:
            check_whole(self.samples, 1, argument="samples")

    @classmethod
    def of(cls, selection: SelectionOptions | RuleLike) -> SelectionOptions:
        """Return the options; shorthand is the rule alone."""
        return selection if isinstance(selection, SelectionOptions) else cls(rule=selection)

    @property
    def rule_name(self) -> str:
        """What a record calls the rule: its name, a function's name, or ``"by name"`` for a list of layers."""
        if isinstance(self.rule, str):
            return self.rule
        return getattr(self.rule, "__name__", "function") if callable(self.rule) else "by name"


@dataclass(frozen=True)
class Budget:
    """
    How many layers are chosen: a share of them, a number, or as many as fit into a share of the parameters.

    Pass exactly one of `share`, `count` and `parameter_share`.

    :param share: Share of all layers, in (0, 1], rounded; at least one layer.
    :param count: Number of layers, at least 1.
    :param parameter_share: Share of the network's scalar parameters, in (0, 1], to within a tenth of it. A layer that
           exceeds it by itself is passed over. Of the others, the best are taken until one does not fit.
    :param fill: Pass over every layer that does not fit into what is left of `parameter_share`, to within nothing, and
           go on with worse ones.
    :raises ValueError: If none or several are given, or one is out of its range.
    """

    share: float | None = None
    count: int | None = None
    parameter_share: float | None = None
    fill: bool = False

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None and name != "fill"}
        if len(given) != 1:
            raise ValueError(f"`Budget` takes exactly one of share, count and parameter_share, got {given or 'none'}.")
        for name, value in given.items():
            if name == "count":
                check_whole(value, 1, argument=name)
            else:
                check_share(value, argument=name)
        if self.fill and self.parameter_share is None:
            raise ValueError(f"`fill` needs `parameter_share`, got {name}={value!r}.")

    @classmethod
    def of(cls, budget: Budget | float) -> Budget:
        """Return the budget; shorthand is a share of the layers."""
        if isinstance(budget, Budget):
            return budget
        check_share(budget, argument="budget")
        return cls(share=budget)

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None and name != "fill"}
        ((name, value),) = given.items()
        return f"{name}={value:g}" + ", fill=True" * self.fill


@dataclass(frozen=True)
class PerformanceOptions:
    """
    Ways to run faster. They round differently, and whether they are faster depends on the machine.

    :param amp: Train in bfloat16 where autocast allows it, without a gradient scaler; ART's ``use_amp`` is not used.
           Selection and validation stay in float32.
    :param compile: Run attacks on the network's output through ``torch.compile``. Passes that look at features or stop
           early are not compiled, nor is the update of the weights.
    :param channels_last: Store images and convolution weights with channels last during ``fit``.
    """

    amp: bool = False
    compile: bool = False
    channels_last: bool = False


@dataclass(frozen=True)
class ReuseOptions:
    """
    How an attack goes on from the perturbation that it found for the same image in the last epoch.

    :param steps: Number of steps, at least 1.
    :param step_size: Size of a step, in units of the input, above 0; `None` for ε/2.
    :param required: Refuse a run whose perturbations cannot be reused. Otherwise the full attack is run, and the log
           says why.
    :raises ValueError: If a value is out of its range.
    """

    steps: int = 1
    step_size: float | None = None
    required: bool = True

    def __post_init__(self) -> None:
        check_whole(self.steps, 1, argument="reuse_perturbations")
        if self.step_size is not None and not (is_number(self.step_size) and 0 < self.step_size < float("inf")):
            raise ValueError(f"`step_size` must be a number above 0, or None, got {self.step_size!r}.")

    @classmethod
    def of(cls, reuse: ReuseOptions | int | str | None) -> ReuseOptions | None:
        """Return the options; shorthand is a number of steps, or ``"auto"``."""
        if reuse is None or isinstance(reuse, ReuseOptions):
            return reuse
        if isinstance(reuse, str):
            check_choice(reuse, ("auto",), argument="reuse_perturbations")
            return cls(required=False)
        return cls(steps=reuse)


_DEFAULT = {"objective": "adversarial", "selection": "criticality", "weight_perturbation": 0.0, "freeze_norms": True}

#: Values of what the papers leave open, by preset. "default" was chosen on validation images, see
#: evaluation/results/paper_tables.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": _DEFAULT,
    "paper": {**_DEFAULT, "objective": "clean", "freeze_norms": False},
    "safer": {**_DEFAULT, "objective": "pgd_at", "selection": "sharpness", "weight_perturbation": 0.01},
}


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """
    All options of a run; :class:`art_clat.AdversarialTrainerCLATPyTorch` documents them.

    :raises TypeError: If an option is of the wrong kind.
    :raises ValueError: If an option is out of its range.
    """

    ratio: float
    warmup: int
    first_stage: str
    objective: str
    criticality_weight: float
    weight_perturbation: float
    selection: SelectionOptions
    budget: Budget
    reselect_every: int
    layers: LayerOptions
    augmentation: Callable[[torch.Tensor], torch.Tensor] | None
    ema_decay: float | None
    reuse_perturbations: ReuseOptions | None
    performance: PerformanceOptions
    seed: int | None

    def __post_init__(self) -> None:
        check_share(self.ratio, argument="ratio")
        check_whole(self.warmup, 0, argument="warmup")
        check_at_least(self.criticality_weight, 0, argument="criticality_weight")
        check_at_least(self.weight_perturbation, 0, argument="weight_perturbation")
        check_whole(self.reselect_every, 1, argument="reselect_every")
        if self.ema_decay is not None and not (is_number(self.ema_decay) and 0 < self.ema_decay < 1):
            raise ValueError(f"`ema_decay` must be a number in (0, 1), or None, got {self.ema_decay!r}.")
        if self.augmentation is not None and not callable(self.augmentation):
            raise TypeError(
                f"`augmentation` must be a transform, a function of an image, got {type(self.augmentation).__name__}."
            )
        if not isinstance(self.performance, PerformanceOptions):
            raise TypeError(f"`performance` must be a PerformanceOptions, got {self.performance!r}.")
        if self.seed is not None:
            check_seed(self.seed)

    def chooses_before(self, epoch: int) -> bool:
        """Return whether layers are chosen before an epoch."""
        rounds, rest = divmod(epoch - self.warmup, self.reselect_every)
        return rounds >= 0 and rest == 0

    def describe(self) -> dict[str, Any]:
        """Return the options as JSON can hold them; a function becomes its ``repr`` without the address."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """
    The options of one call of ``fit``, which documents the first ones. Those below are its ``**kwargs``.

    :param callbacks: What observes the run and may end it: a list of :class:`art_clat.Callback`, such as
           :class:`art_clat.CSVLog` and :class:`art_clat.TensorBoardLog`.
    :param validate_every: Validate after every so many epochs, at least 1, and after the last one in any case.
    :param scheduler_step: ``"epoch"`` or ``"batch"``: after which of them `scheduler` is stepped. timm's schedulers
           know it themselves, by their ``t_in_epochs``.
    :param max_grad_norm: Scale the gradient of all parameters that are trained down to this ℓ2 norm, above 0, before
           each step, as ``torch.nn.utils.clip_grad_norm_`` does. `None` not to.
    :param resume: Go on with the run of this trainer's latest call, which also had ``resume=True``: with its weights,
           momentum, average and history. `nb_epochs` counts the epochs of all calls, so calls with 1, 2, … 10 end with
           the weights of a single call with 10. The first call begins the run. The other arguments must be the same. A
           `checkpoint` goes on in any case, also in another process.
    :param drop_last: Leave out the last batch of an epoch if it is smaller than the others.
    :param verbose: Show a progress bar.
    :raises TypeError: If ``fit`` was given an option that it does not have.
    :raises ValueError: If an option is out of its range.
    """

    batch_size: int
    nb_epochs: int
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int = 200
    restore_best: bool = False
    callbacks: Sequence[Any] = ()
    validate_every: int = 1
    scheduler_step: str = "epoch"
    max_grad_norm: float | None = None
    resume: bool = False
    drop_last: bool = False
    verbose: bool = True

    def __post_init__(self) -> None:
        for argument in ("batch_size", "nb_epochs", "checkpoint_every", "validate_every"):
            check_whole(getattr(self, argument), 1, argument=argument)
            object.__setattr__(self, argument, int(getattr(self, argument)))  # NumPy's numbers become Python's
        for argument in ("restore_best", "resume", "drop_last", "verbose"):
            object.__setattr__(self, argument, bool(getattr(self, argument)))
        if not isinstance(self.callbacks, (list, tuple)):
            raise TypeError(f"`callbacks` must be a list of callbacks, got {type(self.callbacks).__name__}.")
        check_choice(self.scheduler_step, ("epoch", "batch"), argument="scheduler_step")
        if (norm := self.max_grad_norm) is not None:
            if not is_number(norm) or not 0 < norm < float("inf"):
                raise ValueError(f"`max_grad_norm` must be a finite number above 0, or None, got {norm!r}.")
            object.__setattr__(self, "max_grad_norm", float(norm))
        folder = self.checkpoint
        if folder is not None and (not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder)):
            raise ValueError(f"`checkpoint` must be the path of a folder, or None, got {folder!r}.")

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], *accepted: str, **given: Any) -> FitOptions:
        """Return the options of a call; its ``**kwargs`` may hold the `accepted` ones."""
        if unknown := sorted(set(kwargs) - set(accepted)):
            raise TypeError(
                f"Unknown option(s) in `**kwargs`: {', '.join(unknown)}; accepted are {', '.join(accepted)}."
            )
        return cls(**given, **kwargs)

    def check_data(self, nb_samples: int | None, *, has_validation: bool) -> None:
        """Refuse options that do not fit the data; `nb_samples` is `None` for a generator."""
        if self.drop_last and nb_samples is not None and nb_samples < self.batch_size:
            raise ValueError(
                f"`drop_last` leaves no batch: `x` has {nb_samples} inputs, `batch_size` is {self.batch_size}. Use a "
                "smaller `batch_size`."
            )
        if self.restore_best and not has_validation:
            raise ValueError("`restore_best` needs `validation_data`, on which the best epoch is found.")
        if self.validate_every > 1 and not has_validation:
            raise ValueError(f"`validate_every={self.validate_every}` needs `validation_data`.")

    def describe(self) -> dict[str, Any]:
        """Return the options that the result depends on, ready for JSON."""
        return {
            **{"batch_size": self.batch_size, "nb_epochs": self.nb_epochs, "drop_last": self.drop_last},
            **self.describe_steps(),
        }

    def describe_steps(self) -> dict[str, Any]:
        """Return how steps and validations depart from the defaults; runs of older versions had no such options."""
        defaults = {"validate_every": 1, "scheduler_step": "epoch", "max_grad_norm": None}
        return {name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value}


def preset_values(preset: str, layers: LayerOptions, **given: Any) -> dict[str, Any]:
    """Return the options that a preset sets, by name; what the user left at `None` comes from the preset."""
    check_choice(preset, tuple(PRESETS), argument="preset")
    values = PRESETS[preset]
    if layers.freeze_norms is None:
        layers = replace(layers, freeze_norms=values["freeze_norms"] and layers.granularity == "layer")
    options = {name: values[name] if value is None else value for name, value in given.items()}
    return {**options, "selection": SelectionOptions.of(options["selection"]), "layers": layers}


def _plain(value: object) -> Any:
    """Turn an option into something that JSON can hold and that is equal in every process."""
    if isinstance(
        value, (LayerOptions, SelectionOptions, Budget, ReuseOptions, PerformanceOptions)
    ):  # users' objects stay as they are
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    return value.item() if is_number(value) and hasattr(value, "item") else text_of(value)
