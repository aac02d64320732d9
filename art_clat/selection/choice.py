"""Choose layers by the scores of a rule, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from art_clat.config import Budget
from art_clat.layers.layer import Layer
from art_clat.selection.budget import check_budget, take_layers
from art_clat.selection.candidates import Candidates


def check_names(selection: object, eligible: Sequence[Layer]) -> None:
    """Refuse names of layers that may not be chosen; a `selection` that is not a list of names passes."""
    known = [layer.name for layer in eligible]
    names = selection if isinstance(selection, (list, tuple)) else ()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"`selection` names {', '.join(unknown)}, which cannot be chosen; the layers that can be are "
            f"{', '.join(known)}."
        )


def check_selection(selection: object, budget: Budget, eligible: Sequence[Layer], model: nn.Module) -> None:
    """Refuse names of layers that may not be chosen, and a budget that pays for none."""
    check_names(selection, eligible)
    if selection != "all" and not isinstance(selection, (list, tuple)):  # these ignore the budget
        check_budget(budget, eligible, sum(p.numel() for p in model.parameters()))


def eligible_layers(layers: Sequence[Layer], *, head_eligible: bool) -> list[Layer]:
    """
    Return the layers that may be chosen: those with a parameter that the user did not freeze, and the head only if
    asked.

    Eq. 2 divides by a feature's number of elements, but a norm grows only with its square root. The head has as few
    outputs as there are classes, so it would win for its width, and training the head alone gains nothing.
    """
    eligible = [
        layer
        for layer in layers
        if (head_eligible or not layer.is_head) and any(p.requires_grad for p in layer.parameters())
    ]
    if not eligible:
        raise ValueError(
            "`classifier.model` has no layer to choose from: every layer is frozen (`requires_grad=False`) or is the "
            f"classifier head, and `head_eligible` is {head_eligible}. Unfreeze a layer, or pass "
            "`layers=LayerOptions(head_eligible=True)`."
        )
    return eligible


class Choice(NamedTuple):
    """The layers that a rule chose, and its scores of all layers, both in execution order."""

    layers: list[Layer]
    scores: list[float]


def choose(rule: Callable[[Candidates], Sequence[float]], candidates: Candidates, budget: Budget) -> Choice:
    """Choose layers by a rule within a budget; of equal scores the earlier layer wins."""
    layers, eligible, classifier = candidates.layers, set(candidates.eligible), candidates.classifier
    scored = torch.tensor([float(score) for score in rule(candidates)], dtype=torch.float64, device=classifier.device)
    if len(scored) != len(layers):
        raise ValueError(
            f"`selection`: the rule returned {len(scored)} scores for {len(layers)} layers; it must return one a layer."
        )
    scores = dict(zip(layers, classifier.ranks.first(scored).tolist(), strict=True))
    usable = [layer for layer in layers if layer in eligible and scores[layer] > -math.inf]
    if not usable:
        raise ValueError(
            "`selection`: no layer that may be chosen has a score; all are NaN or minus infinity. The rule returns no "
            "others, or the attack changes no feature."
        )
    always = [layer for layer in usable if scores[layer] == math.inf]
    ranked = sorted((layer for layer in usable if layer not in always), key=lambda layer: scores[layer], reverse=True)
    nb_parameters = sum(p.numel() for p in classifier.model.parameters())
    paid = take_layers(budget, ranked, nb_layers=len(layers), nb_parameters=nb_parameters)
    chosen = {*always, *paid}
    if not chosen:
        raise ValueError(
            f"`budget`: no layer that the rule scores fits into {budget.parameter_share:g} of the parameters. Use a "
            "larger share."
        )
    return Choice([layer for layer in layers if layer in chosen], list(scores.values()))
