"""ε-weakness and criticality of every layer (CLAT, arXiv 2408.10204, eq. 2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier

from art_clat.attacks.ascent import in_chunks
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.features import Features
from art_clat.layers.groups import Granularity
from art_clat.layers.layer import Layer
from art_clat.models.checks import check_attack, check_classifier, check_data
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.utils.checks import check_seed, check_whole
from art_clat.utils.modes import evaluation_mode
from art_clat.utils.processes import Part
from art_clat.utils.randomness import own_randomness

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LayerCriticality:
    """
    What was measured of one layer.

    :param name: Name of the layer's weighted module, as in ``classifier.model.named_modules()``, or of the block.
    :param weakness: ε-weakness ``W_ε(F_i)``, eq. 2.
    :param criticality: Criticality index ``C_i = W_ε(F_i) / W_ε(F_{i−1})``, eq. 3; NaN where the predecessor has
           weakness zero.
    :param relative_error: ``R_i = E[‖F_i(x+δ) − F_i(x)‖_2 / ‖F_i(x)‖_2]``, the relative error of LSA (arXiv
           2202.02626). Neither the number nor the scale of a layer's outputs changes it.
    :param relative_criticality: ``R_i / R_{i−1}``, the index free of scale: how much a layer amplifies a relative
           perturbation; NaN where the layer before has none.
    :param nb_parameters: Number of the layer's scalar parameters, those of its norm included.
    :param shape: Shape of one sample's feature.
    :param is_head: Whether the layer gives the class scores.
    """

    name: str
    weakness: float
    criticality: float
    nb_parameters: int
    shape: tuple[int, ...]
    is_head: bool
    relative_error: float = math.nan
    relative_criticality: float = math.nan


@dataclass(frozen=True)
class Criticality(Sequence[LayerCriticality]):
    """
    The layers of a network in execution order, with their weakness and criticality. Prints as a table.

    :param layers: One entry a layer.
    :param input_weakness: ``W_ε(F_0)``, the weakness of the input itself.
    :param nb_samples: How many samples the expectation of eq. 2 was taken over.
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

        Bars start at 1: upwards for a layer that amplifies weakness, downwards for one that damps it. The head's are
        hatched.

        :param ax: Where to draw, or `None` for a new figure.
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


#: What ``F_{i−1}`` is, see :func:`measure_criticality`.
PREDECESSORS = ("execution", "input")


def check_layers_wanted(granularity: Granularity, predecessor: str, *, after_norm: bool) -> None:
    """
    Check the arguments that say what layers are and what comes before each.

    :param granularity: As in :func:`measure_criticality`, like the others.
    :param predecessor: The predecessor.
    :param after_norm: Whether features are those after the norm.
    :raises ValueError: If one has no such value, or the two do not go together.
    """
    if predecessor not in PREDECESSORS:
        raise ValueError(f"`predecessor` must be one of {', '.join(map(repr, PREDECESSORS))}, got {predecessor!r}.")
    if after_norm and granularity != "layer":
        raise ValueError(
            f"`after_norm` asks for `granularity='layer'`, got {granularity!r}: the feature of a block or module is "
            "what it returns."
        )


def measure_criticality(
    classifier: PyTorchClassifier,
    x: npt.NDArray[np.floating],
    y: npt.NDArray[np.generic] | None = None,
    *,
    attack: EvasionAttack,
    batch_size: int = 128,
    after_norm: bool = False,
    granularity: Granularity = "layer",
    predecessor: str = "execution",
    seed: int = 0,
) -> Criticality:
    """
    Measure the ε-weakness and the criticality index of every layer.

    One untargeted attack on the network's output gives one perturbation a sample; one clean and one perturbed forward
    pass then give the weakness of every layer at once (arXiv 2408.10204, eq. 2 and 3). The supremum of eq. 2 is
    approximated by that one perturbation, as in the paper. The network runs in evaluation mode and comes back as it
    was, the global random generators included.

    A layer is a weighted leaf module with the norm on its output, unless `granularity` says otherwise. Layers come in
    execution order, and ``F_{i−1}`` is the layer that ran before, unless `predecessor` says otherwise. ``F_0`` is the
    input as the classifier takes it. A feature is what the weighted module returns, whatever activation runs in place
    on it afterwards, or what its norm returns with `after_norm`. Where other modules use a weight without calling its
    module, the feature is what the function returns that takes it.

    Example::

        attack = ProjectedGradientDescent(classifier, eps=8 / 255, eps_step=2 / 255, max_iter=10, num_random_init=1)
        print(measure_criticality(classifier, x_train[:1024], y_train[:1024], attack=attack))

    :param classifier: The classifier; it needs no optimiser here.
    :param x: Inputs, shape (n, *input_shape), floating point, within the classifier's ``clip_values``.
    :param y: Index labels, shape (n,), or one-hot labels, shape (n, nb_classes); `None` for the classifier's own
           predictions.
    :param attack: An untargeted ART evasion attack on this classifier.
    :param batch_size: Samples in one forward pass; the result does not depend on it but for the order of sums (and
           the attack's random start), unless the network itself does: a BatchNorm without running statistics normalises
           by what is in the pass, clean and perturbed together.
    :param after_norm: Take the features of layers that have a norm after it. A convolution's scale before a BatchNorm
           is arbitrary, and so is its weakness there; after the norm it is the scale the norm has learned.
    :param granularity: ``"layer"``: weighted leaf modules. ``"block"``: timm's own grouping of a network's parameters,
           ``group_matcher``. Or a list of module names and regular expressions that match whole names: each module that
           matches is a layer. The feature of a block or module is the first tensor it returns.
    :param predecessor: ``"execution"``: ``F_{i−1}`` is the feature of the layer that ran before, as in the paper.
           ``"input"``: it is the tensor that enters the layer, of several the first; in a network that is no chain the
           two differ.
    :param seed: Seed of the attack's random start.
    :return: One entry a layer, in execution order.
    :raises TypeError: If `classifier` is not a ``PyTorchClassifier`` or `attack` not an evasion attack.
    :raises ValueError: If the attack is targeted or bound to another classifier, the data are unusable, the network
            has no weighted layer, `granularity` or `predecessor` do not fit, or the attack moved no input.
    """
    check_classifier(classifier, needs_optimizer=False)
    check_attack(attack, classifier, argument="attack")
    labels_or_any = np.zeros(len(x), dtype=np.int64) if y is None else y
    inputs, labels = check_data(classifier, x, labels_or_any, argument="x", label_argument="y")
    check_whole(batch_size, 1, argument="batch_size")
    check_seed(seed)
    check_layers_wanted(granularity, predecessor, after_norm=after_norm)
    network = TensorClassifier(classifier)
    with own_randomness(seed, network.device), evaluation_mode(classifier._model):
        layers = network.find_layers(inputs, after_norm=after_norm, granularity=granularity)
        parts = labels.split(batch_size) if y is not None else [None] * -(-len(inputs) // batch_size)
        batches = [(x, y, Part(len(x))) for x, y in zip(inputs.split(batch_size), parts, strict=True)]
        return measure(network, layers, batches, TensorAttack(attack, network), predecessor=predecessor)


def measure(
    network: TensorClassifier,
    layers: Sequence[Layer],
    batches: Sequence[tuple[torch.Tensor, torch.Tensor | None, Part]],
    attack: TensorAttack,
    *,
    predecessor: str = "execution",
) -> Criticality:
    """
    Measure layers on batches that are already tensors; the core of :func:`measure_criticality`.

    :param network: The network.
    :param layers: Its layers in execution order.
    :param batches: Inputs, labels or `None` for the network's own predictions, and which of a whole batch they are.
    :param attack: The output attack that gives δ.
    :param predecessor: As in :func:`measure_criticality`.
    :return: One entry a layer; on several processes the same in all, over the batches of all.
    :raises ValueError: If the attack moved no input.
    """
    from_inputs = predecessor == "input"
    features = Features(layers, inputs=from_inputs, lengths=True)
    count = len(layers)
    # Of every layer, and of what enters each if that is wanted, absolute and relative; of the network's input, absolute
    # and relative; and the number of samples.
    sums = torch.zeros((4 if from_inputs else 2) * count + 3, dtype=torch.float64, device=network.device)

    def distances(x: torch.Tensor, x_adv: torch.Tensor) -> torch.Tensor:
        with features.compare_halves(stop=True):
            network.logits(torch.cat([x, x_adv]))
        return torch.stack(
            [
                *(features.distance(layer) for layer in layers),
                *(features.relative_distance(layer) for layer in layers),
                *(features.input_distance(layer) for layer in layers if from_inputs),
                *(features.input_distance(layer, relative=True) for layer in layers if from_inputs),
                moved := (x_adv - x).flatten(1).norm(dim=1),
                moved / x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny),
                torch.ones(len(x), device=x.device),
            ],
            dim=1,
        )

    with evaluation_mode(network.classifier._model):
        for x, y, part in batches:
            if len(x) == 0:
                continue
            x = x.to(network.device)
            with torch.no_grad():
                y = network.logits(x).argmax(dim=1) if y is None else y.to(network.device)
            x_adv = attack(x, y, part)
            with torch.no_grad():
                sums += in_chunks(distances, x, x_adv, copies=2).double().sum(dim=0)
    *totals, input_sum, relative_sum, nb_samples = network.ranks.first(network.ranks.sum(sums)).tolist()
    if input_sum == 0:
        raise ValueError(
            "The attack moved no input, so that every weakness is zero: it failed on every sample, or its `eps` or "
            "`max_iter` is zero."
        )
    input_weakness = input_sum / nb_samples / math.prod(network.classifier.input_shape)
    absolute, error, *entering = (
        [total / nb_samples for total in totals[first : first + count]] for first in range(0, len(totals), count)
    )
    weakness = [value / layer.size for value, layer in zip(absolute, layers, strict=True)]
    before, error_before = [input_weakness, *weakness[:-1]], [relative_sum / nb_samples, *error[:-1]]
    if from_inputs:
        sizes = [1 if layer.input is None else layer.input.size for layer in layers]
        before = [value / size for value, size in zip(entering[0], sizes, strict=True)]
        error_before = entering[1]
    return Criticality(
        layers=tuple(
            LayerCriticality(
                name=layer.name,
                weakness=weakness[i],
                criticality=weakness[i] / before[i] if before[i] > 0 else math.nan,
                relative_error=error[i],
                relative_criticality=error[i] / error_before[i] if error_before[i] > 0 else math.nan,
                nb_parameters=layer.nb_parameters,
                shape=layer.shape,
                is_head=layer.is_head,
            )
            for i, layer in enumerate(layers)
        ),
        input_weakness=input_weakness,
        nb_samples=int(nb_samples),
    )
