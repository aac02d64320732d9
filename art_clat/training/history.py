"""The record of a run: one entry an epoch, one entry a selection of layers; as JSON and as plots."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from torch import nn

from art_clat.selection.choice import Choice
from art_clat.selection.criticality import Criticality, LayerCriticality
from art_clat.utils.plots import label_layers, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class EpochRecord:
    """
    The record of one epoch.

    :param epoch: Number within one call of ``fit``, from 0.
    :param stage: ``"adversarial training"`` (the whole network) or ``"clat"`` (the chosen layers).
    :param loss: Mean over the epoch of the loss that was minimised.
    :param cross_entropy: Mean of the classifier's loss within it.
    :param criticality_loss: Mean of ``L_C``, or of a rival's second term, before its weight; 0 for PGD-AT.
    :param learning_rate: Learning rate of the optimiser's first parameter group in the epoch's last batch.
    :param seconds: Seconds of training, without validation and selection.
    :param train_clean_accuracy: Accuracy on the training batches before the attack, in [0, 1]; `None` if the objective
           computes no clean logits.
    :param train_robust_accuracy: Accuracy on the perturbed training batches, in [0, 1]; they include clean samples if
           `ratio` is below 1. `None` if the objective's logits are clean.
    :param clean_accuracy: Accuracy on the validation data, in [0, 1]; `None` without them, or if it was not
           the epoch's turn.
    :param robust_accuracy: The same under the trainer's first attack.
    :param attack_steps: Number of steps of ``"fgsm_rs"`` at the end of the epoch: 1, and twice as many each time it was
           caught in catastrophic overfitting. `None` for other objectives.
    """

    epoch: int
    stage: str
    loss: float
    cross_entropy: float
    criticality_loss: float
    learning_rate: float
    seconds: float
    train_clean_accuracy: float | None
    train_robust_accuracy: float | None
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    attack_steps: int | None = None

    def summary(self) -> dict[str, str]:
        """Return what a progress bar shows: the loss and its terms, and accuracies, of validation if there are any."""
        clean = self.clean_accuracy if self.clean_accuracy is not None else self.train_clean_accuracy
        robust = self.robust_accuracy if self.robust_accuracy is not None else self.train_robust_accuracy
        shown = {"clean": clean, "robust": robust}
        terms = {"loss": self.loss}
        if self.criticality_loss:
            terms |= {"cross-entropy": self.cross_entropy, "λ·distance": self.loss - self.cross_entropy}
        return {
            **{name: f"{value:.3f}" for name, value in terms.items()},
            **{name: f"{100 * value:.1f} %" for name, value in shown.items() if value is not None},
        }


@dataclass(frozen=True)
class SelectionRecord:
    """
    The record of one selection of layers.

    :param epoch: The epoch before whose first batch the layers were chosen.
    :param measured: The criticality of every layer.
    :param chosen: Names of the layers that are trained from then on.
    :param trainable_parameters: Number of trainable scalar parameters in the chosen layers.
    :param total_parameters: Number of scalar parameters in the network.
    :param seconds: Seconds that the selection took.
    :param rule: Name of the rule that chose.
    :param scores: The rule's score of every layer, in execution order; empty in records of older versions.
    """

    epoch: int
    measured: Criticality
    chosen: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    seconds: float
    rule: str = "criticality"
    scores: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        choice: Choice,
        measured: Criticality,
        *,
        epoch: int,
        rule: str,
        trainable: Collection[nn.Parameter],
        model: nn.Module,
        seconds: float,
    ) -> SelectionRecord:
        """Record a choice of layers of `model`; `trainable` are the parameters that the user did not freeze."""
        parameters = {p for layer in choice.layers for p in layer.parameters() if p in trainable}
        return cls(
            epoch=epoch,
            measured=measured,
            chosen=tuple(layer.name for layer in choice.layers),
            trainable_parameters=sum(p.numel() for p in parameters),
            total_parameters=sum(p.numel() for p in model.parameters()),
            seconds=seconds,
            rule=rule,
            scores=tuple(choice.scores),
        )

    def sentence(self) -> str:
        """Return a line for the log that says what was chosen."""
        return (
            f"CLAT, epoch {self.epoch}: training {len(self.chosen)} of {len(self.measured)} layers "
            f"({', '.join(self.chosen)}), {self.trainable_parameters:,} of {self.total_parameters:,} parameters "
            f"({100 * self.trainable_parameters / self.total_parameters:.2f} %)."
        )

    def __repr__(self) -> str:
        share = self.trainable_parameters / self.total_parameters
        return (
            f"SelectionRecord(epoch={self.epoch}, rule={self.rule!r}, chosen={self.chosen!r}, "
            f"trainable={100 * share:.2f} %)"
        )


@dataclass(frozen=True)
class StrengthRecord:
    """
    How strong the second stage's attack is while it reuses perturbations, in the middle of an epoch.

    A strength is the loss that an attack reaches, as a share of what 20 steps of ε/4 from a random start reach.

    :param epoch: The epoch.
    :param reused: Strength of the attack that goes on from the last epoch's perturbations.
    :param full: Strength of the full attack.
    :param images: Number of training images that were measured.
    """

    epoch: int
    reused: float
    full: float
    images: int


@dataclass
class History:
    """
    The record of one call of ``fit`` or ``fit_generator``.

    :param epochs: One entry an epoch.
    :param selections: One entry a selection.
    :param strengths: How strong reused perturbations are, once in ten epochs; empty without them.
    :param configuration: What the run was made with: the trainer's options, the arguments of ``fit``, attacks,
           optimiser, data, machine and versions; values that JSON can hold. Empty in records of older versions.
    """

    epochs: list[EpochRecord] = field(default_factory=list)
    selections: list[SelectionRecord] = field(default_factory=list)
    configuration: dict[str, Any] = field(default_factory=dict)
    strengths: list[StrengthRecord] = field(default_factory=list)

    def __repr__(self) -> str:
        best = "" if self.best_epoch is None else f", best epoch {self.best_epoch}"
        return f"History({len(self.epochs)} epochs, {len(self.selections)} selections{best})"

    def add_validation(self, clean_accuracy: float, robust_accuracy: float) -> None:
        """Record the validation accuracies of the latest epoch, in [0, 1]."""
        self.epochs[-1] = replace(self.epochs[-1], clean_accuracy=clean_accuracy, robust_accuracy=robust_accuracy)

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the highest robust accuracy on the validation data; `None` without them."""
        validated = [record for record in self.epochs if record.robust_accuracy is not None]
        return max(validated, key=lambda record: record.robust_accuracy or 0.0).epoch if validated else None

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """
        Write the record as JSON. An infinite score becomes ``"inf"`` or ``"-inf"``, another number that is not finite
        ``null``.

        :param path: File to write as well, or `None`.
        :return: The JSON.
        """
        content = asdict(self)
        for selection in content["selections"]:
            selection["scores"] = [str(score) if math.isinf(score) else score for score in selection["scores"]]
        text = json.dumps(_finite(content), indent=2, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text: str) -> History:
        """
        Read what :meth:`to_json` wrote, also with an older version.

        :param text: The JSON, not a file's path.
        :return: The record.
        """
        content = json.loads(text)
        return cls(
            epochs=[EpochRecord(**_numbers(entry, _LOSSES)) for entry in content["epochs"]],
            selections=[_selection(entry) for entry in content["selections"]],
            configuration=content.get("configuration", {}),
            strengths=[StrengthRecord(**_numbers(e, ("reused", "full"))) for e in content.get("strengths", ())],
        )

    def plot_heat_map(self, ax: Axes | None = None) -> Axes:
        """
        Draw every layer's score at every selection, and mark the chosen layers.

        The scores are those of the rule that chose. A criticality index has a logarithmic scale centred on 1, at which
        a layer passes weakness on unchanged; the scores of other rules have a linear one. The head's colour is cut at
        the largest of the other layers. If the rule has no finite scores (``"all"``, layers by name), the criticality
        index is drawn.

        :param ax: Axes to draw on, or `None` for a new figure, sized for the number of layers.
        :return: The axes; layers from top to bottom, selections from left to right.
        :raises ValueError: If no selection was made.
        """
        if not self.selections:
            raise ValueError("There is no selection to draw: no epoch came after the `warmup`.")
        layers = self.selections[0].measured
        names = [layer.name for layer in layers]
        ax = ax if ax is not None else new_axes(width=min(16, 4 + 0.6 * len(self.selections)), height=_height(names))
        colours = _Colours.of(self.selections)
        image = ax.imshow(colours.values, norm=colours.norm, cmap=colours.map, aspect="auto", interpolation="nearest")
        rows = {name: row for row, name in enumerate(names)}
        chosen = [(column, rows[name]) for column, s in enumerate(self.selections) for name in s.chosen]
        size = float(np.clip(1500 / len(names), 6, 60))
        columns, heights = zip(*chosen, strict=True)
        ax.scatter(columns, heights, marker="o", s=size, facecolor="gold", edgecolor="black", linewidth=0.7)
        label_layers(ax.yaxis, [layer.name + " (head)" * layer.is_head for layer in layers])
        _label_epochs(ax, [s.epoch for s in self.selections])
        ax.set_xlabel("selection before epoch")
        ax.set_title("gold: fine-tuned", fontsize=10)
        colours.label(ax.figure.colorbar(image, ax=ax, extend="max", label=colours.title))
        return ax

    def plot_curves(self, ax: Axes | None = None) -> Axes:
        """
        Draw clean and robust accuracy over the epochs: validation as thick lines, training as thin ones.

        Dotted lines mark the selections.

        :param ax: Axes to draw on, or `None` for a new figure.
        :return: The axes.
        :raises ValueError: If there is no epoch.
        """
        from matplotlib.ticker import MaxNLocator

        if not self.epochs:
            raise ValueError("There is no epoch to draw: call `fit` first.")
        ax = ax if ax is not None else new_axes(width=7, height=4)
        epochs = [record.epoch for record in self.epochs]
        for name, label, style in (
            ("clean_accuracy", "validation, clean", {"color": "C0", "linewidth": 2.0}),
            ("robust_accuracy", "validation, robust", {"color": "C3", "linewidth": 2.0}),
            ("train_clean_accuracy", "training, clean", {"color": "C0", "linewidth": 0.8, "linestyle": "--"}),
            ("train_robust_accuracy", "training, robust", {"color": "C3", "linewidth": 0.8, "linestyle": "--"}),
        ):
            values = [getattr(record, name) for record in self.epochs]
            if any(value is not None for value in values):
                curve = [math.nan if value is None else 100 * value for value in values]
                ax.plot(epochs, curve, label=label, marker="." if len(epochs) < 30 else "", **cast(Any, style))
        for selection in self.selections:
            label = "layers chosen" if selection is self.selections[0] else ""
            ax.axvline(selection.epoch - 0.5, color="grey", linewidth=0.8, linestyle=":", label=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("epoch")
        ax.set_ylabel("accuracy [%]")
        ax.legend(fontsize=8)
        return ax


_MEASURES = ("weakness", "criticality", "relative_error", "relative_criticality", "rms_criticality")
_LOSSES = ("loss", "cross_entropy", "criticality_loss", "learning_rate", "seconds")


def _numbers(entry: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Read ``null`` as NaN in entries that are always numbers."""
    return {key: math.nan if value is None and key in names else value for key, value in entry.items()}


def _criticality(entry: dict[str, Any]) -> Criticality:
    layers = (
        LayerCriticality(**{**_numbers(layer, _MEASURES), "shape": tuple(layer["shape"])}) for layer in entry["layers"]
    )
    return Criticality(**{**entry, "layers": tuple(layers)})


def _selection(entry: dict[str, Any]) -> SelectionRecord:
    """Read a selection; its scores are numbers, ``null`` for NaN, or ``"inf"`` and ``"-inf"``."""
    return SelectionRecord(
        **{
            **entry,
            "chosen": tuple(entry["chosen"]),
            "measured": _criticality(entry["measured"]),
            "scores": tuple(math.nan if score is None else float(score) for score in entry.get("scores", ())),
        }
    )


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by `None`."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


#: Rules whose scores are indices: at 1 a layer passes a perturbation on unchanged.
_INDICES = {
    "criticality": "criticality index $C_i$",
    "criticality_rms": "criticality index, root mean square",
    "relative_criticality": "relative criticality index",
}


@dataclass(frozen=True)
class _Colours:
    """The values, scale and colour bar of a heat map."""

    values: npt.NDArray[np.float64]
    norm: Any
    map: str
    title: str
    is_index: bool

    @classmethod
    def of(cls, selections: Sequence[SelectionRecord]) -> _Colours:
        """Take the rule's scores, or the criticality index if some selection has no finite score."""
        from matplotlib.colors import LogNorm, Normalize

        rule = selections[0].rule
        scored = all(len(s.scores) == len(s.measured) and np.isfinite(s.scores).any() for s in selections)
        if scored:
            values = np.array([s.scores for s in selections], dtype=float).T
        else:
            rule, values = "criticality", np.array([[x.criticality for x in s.measured] for s in selections], float).T
        body = values[[not layer.is_head for layer in selections[0].measured]]
        if rule in _INDICES:
            shown = body[np.isfinite(body) & (body > 0)]
            extreme = max(1.1, float(np.max(np.maximum(shown, 1 / shown)))) if shown.size else 1.1
            cut = np.clip(values, 1 / extreme, extreme)
            return cls(cut, LogNorm(1 / extreme, extreme), "RdBu_r", _INDICES[rule], is_index=True)
        shown = body[np.isfinite(body)]
        low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)
        return cls(np.clip(values, low, high), Normalize(low, high), "viridis", f"score of the rule {rule}", False)

    def label(self, colorbar: Any) -> None:
        """Write the ticks of the colour bar."""
        if self.is_index:
            exponent = math.log2(self.norm.vmax)
            ticks = [2**step for step in np.linspace(-exponent, exponent, 5)]
            colorbar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
            colorbar.minorticks_off()


def _height(names: Sequence[str]) -> float:
    return float(np.clip(0.2 * len(names) + 1.5, 3, 14))


def _label_epochs(ax: Axes, epochs: Sequence[int]) -> None:
    every = -(-len(epochs) // 12)
    ax.set_xticks(range(0, len(epochs), every), [str(epoch) for epoch in epochs[::every]])
