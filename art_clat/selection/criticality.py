"""ε-weakness and criticality of every layer (CLAT, arXiv 2408.10204, eq. 2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.config import Granularity, LayerOptions
from art_clat.layers.features import Features
from art_clat.layers.layer import Layer
from art_clat.models.checks import check_attack, check_classifier, check_data, warn_about_eps
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.utils.batch import Batch
from art_clat.utils.checks import check_not_in_inference_mode, check_seed, check_whole
from art_clat.utils.modes import evaluation_mode
from art_clat.utils.randomness import seeded_randomness

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LayerCriticality:
    """
    What was measured of one layer.

    :param name: Name of the layer's weighted module, as in ``classifier.model.named_modules()``, or of the block.
    :param weakness: ε-weakness ``W_ε(F_i)``, eq. 2.
    :param criticality: Criticality index ``C_i = W_ε(F_i) / W_ε(F_{i−1})``, eq. 3; NaN if the predecessor's weakness is
           zero.
    :param relative_error: ``R_i = E[‖F_i(x+δ) − F_i(x)‖_2 / ‖F_i(x)‖_2]``, the relative error of LSA (arXiv
           2202.02626). It depends neither on the number nor on the scale of a layer's outputs.
    :param relative_criticality: ``R_i / R_{i−1}``, how much a layer amplifies a relative perturbation; NaN if the
           predecessor's relative error is zero.
    :param rms_criticality: Eq. 3 with N → √N: the ratio of the root mean squares of the features' changes. Unlike
           `criticality` it does not change with the numbers of elements ``N_i`` and ``N_{i−1}`` alone; NaN as there.
    :param nb_parameters: Number of the layer's scalar parameters, those of its norm included.
    :param shape: Shape of one sample's feature.
    :param is_head: Whether the layer computes the class scores.
    """

    name: str
    weakness: float
    criticality: float
    nb_parameters: int
    shape: tuple[int, ...]
    is_head: bool
    relative_error: float = math.nan
    relative_criticality: float = math.nan
    rms_criticality: float = math.nan


@dataclass(frozen=True)
class Criticality(Sequence[LayerCriticality]):
    """
    The layers of a network in execution order, with their weakness and criticality. ``print`` shows a table.

    :param layers: One entry a layer.
    :param input_weakness: ``W_ε(F_0)``, the weakness of the input.
    :param nb_samples: Number of samples that the expectation of eq. 2 is taken over.
    """

    layers: tuple[LayerCriticality, ...]
    input_weakness: float
    nb_samples: int

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __iter__(self) -> Iterator[LayerCriticality]:
        return iter(self.layers)

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'':>4} {'layer':<{width}} {'weakness':>11} {'criticality':>12} {'relative':>9} {'parameters':>12}"]
        lines += [
            f"{number:>4} {layer.name:<{width}} {layer.weakness:>11.4g} {layer.criticality:>12.4g} "
            f"{layer.relative_criticality:>9.4g} {layer.nb_parameters:>12,}{'  (head)' if layer.is_head else ''}"
            for number, layer in enumerate(self.layers, start=1)
        ]
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """
        Draw the criticality of every layer as a bar chart, in execution order.

        Bars begin at 1: a layer that amplifies weakness has a bar upwards, one that damps it a bar downwards. The
        head's bar is hatched.

        :param ax: Axes to draw on, or `None` for a new figure.
        :return: The axes.
        """
        from art_clat.utils.plots import label_layers, new_axes

        ax = ax if ax is not None else new_axes(width=max(6.0, min(24.0, 0.3 * len(self.layers) + 2)), height=4.5)
        bars = ax.bar(range(len(self.layers)), [layer.criticality - 1 for layer in self.layers], bottom=1)
        for bar, layer in zip(bars, self.layers, strict=True):
            if layer.is_head:
                bar.set(hatch="//", alpha=0.5)
        ax.axhline(1, color="grey", linewidth=0.8)
        # The head's literal index is often a hundred times the others': a linear axis would show nothing else.
        finite = [layer.criticality for layer in self.layers if layer.criticality > 0]
        if finite and max(finite) > 20 * min(finite):
            ax.set_yscale("log")
        ax.set_ylabel("criticality index $C_i$")
        label_layers(ax.xaxis, [layer.name for layer in self.layers], rotation=90)
        return ax


def measure_criticality(
    classifier: PyTorchClassifier,
    x: npt.NDArray[np.floating],
    y: npt.NDArray[np.generic] | None = None,
    *,
    attack: EvasionAttack,
    batch_size: int = 128,
    layers: LayerOptions | Granularity = "layer",
    seed: int = 0,
) -> Criticality:
    """
    Measure the ε-weakness and the criticality index of every layer.

    One untargeted attack on the network's output makes one perturbation a sample. One clean and one perturbed forward
    pass then measure the weakness of all layers (arXiv 2408.10204, eq. 2 and 3). This one perturbation stands for the
    supremum of eq. 2, as in the paper. The network runs in evaluation mode. Its modes and the global random generators
    are restored afterwards.

    ``F_0`` is the input as the classifier takes it. A feature is what the weighted module returns, before any in-place
    activation. If a function takes the weight without the module being called, the feature is the function's result.

    Example::

        attack = ProjectedGradientDescent(classifier, eps=8 / 255, eps_step=2 / 255, max_iter=10, num_random_init=1)
        print(measure_criticality(classifier, x_train[:1024], y_train[:1024], attack=attack))

    :param classifier: The classifier; it needs no optimiser here.
    :param x: Inputs, shape (n, *input_shape), floating point, within the classifier's ``clip_values``.
    :param y: Index labels, shape (n,), or one-hot labels, shape (n, nb_classes); `None` for the classifier's
           predictions.
    :param attack: An untargeted ART evasion attack on this classifier.
    :param batch_size: Samples in one forward pass. It changes the result only through the order of sums and the
           attack's random start. But a BatchNorm without running statistics normalises over each pass, clean and
           perturbed samples together, and so depends on it.
    :param layers: What counts as one layer: ``"layer"``, ``"block"``, a list of module names and regular expressions,
           or :class:`art_clat.LayerOptions`.
    :param seed: Seed of the attack's random start, 0 … 2**32 − 1.
    :return: One entry a layer, in execution order.
    :raises TypeError: If `classifier` is not a ``PyTorchClassifier``, or `attack` is not an evasion attack.
    :raises ValueError: If the attack is targeted or bound to another classifier, the data are unusable, the network has
            no weighted layer, `layers` do not fit it, or the attack moved no input.
    """
    check_classifier(classifier, needs_optimizer=False)
    check_attack(attack, classifier, argument="attack")
    check_not_in_inference_mode("measure_criticality")
    warn_about_eps(attack, classifier)
    labels_or_any = np.zeros(len(x), dtype=np.int64) if y is None else y
    inputs, labels = check_data(classifier, x, labels_or_any, argument="x", label_argument="y")
    check_whole(batch_size, 1, argument="batch_size")
    check_seed(seed)
    options = LayerOptions.of(layers)
    tensors = TensorClassifier(classifier)
    with seeded_randomness(seed, tensors.device), evaluation_mode(classifier._model):
        found = tensors.find_layers(inputs, replace(options, freeze_norms=None))
        batches = [Batch.whole(*pair) for pair in zip(inputs.split(batch_size), labels.split(batch_size), strict=True)]
        if y is None:
            batches = [_with_predictions(tensors, batch) for batch in batches]
        return measure(tensors, found, batches, TensorAttack(attack, tensors), predecessor=options.predecessor)


def measure(
    classifier: TensorClassifier,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    attack: TensorAttack,
    *,
    predecessor: str = "execution",
) -> Criticality:
    """
    Measure the criticality of layers on batches of tensors; the core of :func:`measure_criticality`.

    :param classifier: The classifier that the layers belong to.
    :param layers: All its layers, in execution order.
    :param batches: The samples. A batch may be empty in this process if several share it.
    :param attack: The output attack that makes δ.
    :param predecessor: What ``F_{i−1}`` of eq. 3 is, see :class:`art_clat.LayerOptions`.
    :return: One entry a layer, measured on the batches of all processes; equal in every process.
    :raises ValueError: If the attack moved no input.
    """
    from_inputs = predecessor == "input"
    features, count = Features(layers, inputs=from_inputs, lengths=True), len(layers)
    sums = torch.zeros((4 if from_inputs else 2) * count + 3, dtype=torch.float64, device=classifier.device)
    with evaluation_mode(classifier.estimator._model):
        for batch in (batch.to(classifier.device) for batch in batches if len(batch)):
            x_adv = attack(batch)
            sums += _distances(classifier, features, batch, x_adv, from_inputs=from_inputs).double().sum(dim=0)
    *totals, moved, moved_relatively, nb_samples = classifier.ranks.first(classifier.ranks.sum(sums)).tolist()
    if moved == 0:
        raise ValueError(
            "The attack moved no input, so every weakness is zero: it failed on every sample, or its `eps` or "
            "`max_iter` is zero. Use a stronger attack."
        )
    absolute, error, *entering = (
        [total / nb_samples for total in totals[first : first + count]] for first in range(0, len(totals), count)
    )
    input_size = math.prod(classifier.estimator.input_shape)
    input_weakness = moved / nb_samples / input_size
    weakness = [value / layer.size for value, layer in zip(absolute, layers, strict=True)]
    sizes_before = [input_size, *(layer.size for layer in layers[:-1])]
    before, error_before = [input_weakness, *weakness[:-1]], [moved_relatively / nb_samples, *error[:-1]]
    if from_inputs:
        sizes_before = [1 if layer.input is None else layer.input.size for layer in layers]
        before = [value / size for value, size in zip(entering[0], sizes_before, strict=True)]
        error_before = entering[1]
    return Criticality(
        layers=tuple(
            LayerCriticality(
                name=layer.name,
                weakness=weakness[i],
                criticality=_ratio(weakness[i], before[i]),
                rms_criticality=_ratio(weakness[i] * layer.size**0.5, before[i] * sizes_before[i] ** 0.5),
                relative_error=error[i],
                relative_criticality=_ratio(error[i], error_before[i]),
                nb_parameters=layer.nb_parameters,
                shape=layer.shape,
                is_head=layer.is_head,
            )
            for i, layer in enumerate(layers)
        ),
        input_weakness=input_weakness,
        nb_samples=int(nb_samples),
    )


@torch.no_grad()
def _distances(
    classifier: TensorClassifier, features: Features, batch: Batch, x_adv: torch.Tensor, *, from_inputs: bool
) -> torch.Tensor:
    """Return for every sample: distances of all layers, relative ones, those of their inputs, of the input, and 1."""
    layers, rows = features.layers, []
    chunks = batch.chunks(copies=2)
    for chunk, perturbed in zip(chunks, x_adv.split([len(chunk) for chunk in chunks]), strict=True):
        with features.compare_halves(stop=True):
            classifier.logits(torch.cat([chunk.x, perturbed]))
        moved = (perturbed - chunk.x).flatten(1).norm(dim=1)
        length = chunk.x.flatten(1).norm(dim=1).clamp(min=torch.finfo(chunk.x.dtype).tiny)
        columns = [
            *(features.distance(layer) for layer in layers),
            *(features.relative_distance(layer) for layer in layers),
            *(features.input_distance(layer) for layer in layers if from_inputs),
            *(features.input_distance(layer, relative=True) for layer in layers if from_inputs),
            *(moved, moved / length, torch.ones_like(moved)),
        ]
        rows.append(torch.stack(columns, dim=1))
    return torch.cat(rows)


def _ratio(value: float, before: float) -> float:
    """Return the ratio, or NaN if the denominator is not positive."""
    return value / before if before > 0 else math.nan


def _with_predictions(classifier: TensorClassifier, batch: Batch) -> Batch:
    """Replace the labels by the network's predictions."""
    with torch.no_grad():
        predictions = classifier.logits(batch.x.to(classifier.device)).argmax(dim=1)
    return replace(batch, y=predictions)
