"""Which layers to fine-tune, given their criticality."""

from __future__ import annotations

import math
from collections.abc import Sequence

from art_clat.criticality import Criticality
from art_clat.layers import Layer


def eligible_layers(layers: Sequence[Layer], *, head_eligible: bool) -> list[Layer]:
    """
    Give the layers that may be chosen: those with a parameter that its owner has not frozen, usually not the head.

    Eq. 2 divides by the number of elements of a feature, and a norm grows only with its root: the head, with as few
    outputs as classes, would win by its narrowness alone, and training it alone gains nothing.

    :param layers: All layers, in execution order.
    :param head_eligible: Whether the head may be chosen too.
    :return: A part of `layers`.
    :raises ValueError: If none is left.
    """
    eligible = [
        layer
        for layer in layers
        if (head_eligible or not layer.is_head) and any(p.requires_grad for p in layer.parameters())
    ]
    if not eligible:
        raise ValueError(
            "`classifier.model` has no layer to choose from: every layer is frozen (`requires_grad=False`) or is the "
            f"classifier head, with `head_eligible={head_eligible}`."
        )
    return eligible


def most_critical(
    measured: Criticality, layers: Sequence[Layer], eligible: Sequence[Layer], *, fraction: float
) -> list[Layer]:
    """
    Choose the layers with the largest criticality index (arXiv 2408.10204, section 3).

    :param measured: The criticality of `layers`, in the same order.
    :param layers: All layers, in execution order.
    :param eligible: The layers to choose from; never one whose criticality is not finite.
    :param fraction: Share of all layers to choose, in (0, 1]; at least one is chosen.
    :return: The chosen layers, in execution order.
    :raises ValueError: If no eligible layer has a finite criticality.
    """
    budget = max(1, round(fraction * len(layers)))
    index = {
        layer: entry.criticality
        for layer, entry in zip(layers, measured, strict=True)
        if layer in set(eligible) and math.isfinite(entry.criticality)
    }
    if not index:
        raise ValueError("No layer has a finite criticality: the perturbation reaches none of their features.")
    chosen = sorted(index, key=lambda layer: index[layer], reverse=True)[:budget]
    return [layer for layer in layers if layer in set(chosen)]
