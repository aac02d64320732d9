"""Choose layers by the scores of a rule, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from art_clat.config import Budget
from art_clat.layers.layer import Layer
from art_clat.selection.budget import take_layers
from art_clat.selection.candidates import Candidates


def check_names(selection: object, eligible: Sequence[Layer]) -> None:
    """
    Refuse names of layers that may not be chosen.

    :param selection: What the user passed; anything but a list of names is left alone.
    :param eligible: The layers that may be chosen.
    :raises ValueError: If there is such a name.
    """
    known = [layer.name for layer in eligible]
    names = selection if isinstance(selection, (list, tuple)) else ()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"`selection` names {', '.join(unknown)}, no layer(s) that may be chosen; those are {', '.join(known)}."
        )


def eligible_layers(layers: Sequence[Layer], *, head_eligible: bool) -> list[Layer]:
    """
    Return the layers that may be chosen: those with a parameter that its owner has not frozen, usually not the head.

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


class Choice(NamedTuple):
    """
    What a rule chose.

    :param layers: The chosen layers, in execution order.
    :param scores: The rule's score of every layer of the network, in execution order.
    """

    layers: list[Layer]
    scores: list[float]


def choose(rule: Callable[[Candidates], Sequence[float]], candidates: Candidates, budget: Budget) -> Choice:
    """
    Choose layers by a rule, within a budget.

    :param rule: The rule.
    :param candidates: What it chooses from.
    :param budget: How many.
    :return: The chosen layers; of equal scores the earlier layer wins.
    :raises ValueError: If the rule gives another number of scores, or no eligible layer that fits a score.
    """
    layers, eligible, classifier = candidates.layers, set(candidates.eligible), candidates.classifier
    scored = torch.tensor([float(score) for score in rule(candidates)], dtype=torch.float64, device=classifier.device)
    if len(scored) != len(layers):
        raise ValueError(f"`selection`: the rule gave {len(scored)} scores for {len(layers)} layers.")
    scores = dict(zip(layers, classifier.ranks.first(scored).tolist(), strict=True))
    usable = [layer for layer in layers if layer in eligible and scores[layer] > -math.inf]
    if not usable:
        raise ValueError(
            "No layer has a finite score: the perturbation reaches none of their features, or the rule scores none."
        )
    always = [layer for layer in usable if scores[layer] == math.inf]
    ranked = sorted((layer for layer in usable if layer not in always), key=lambda layer: scores[layer], reverse=True)
    nb_parameters = sum(p.numel() for p in classifier.model.parameters())
    paid = take_layers(budget, ranked, nb_layers=len(layers), nb_parameters=nb_parameters)
    chosen = {*always, *paid}
    if not chosen:
        raise ValueError(
            f"`budget`: no layer that the rule scores fits into {budget.parameter_share:g} of the parameters."
        )
    return Choice([layer for layer in layers if layer in chosen], list(scores.values()))
