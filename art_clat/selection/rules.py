"""Which layers to fine-tune: rules that score layers, criticality and its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from art_clat.layers.layer import Layer
from art_clat.selection.budget import Budget
from art_clat.selection.candidates import Candidates

#: Scores the layers, one number each, in their order. The eligible layers with the highest are chosen, as many as the
#: budget allows; those with infinity whatever the budget, those with NaN or minus infinity never.
SelectionRule = Callable[[Candidates], Sequence[float]]


_RULES: dict[str, SelectionRule] = {}


def register_selection_rule(name: str) -> Callable[[SelectionRule], SelectionRule]:
    """
    Make a rule known by a name, for the trainer's ``selection=``.

    Example::

        @register_selection_rule("smallest")
        def smallest(candidates):
            return [-layer.nb_parameters for layer in candidates.layers]

    :param name: The name.
    :return: A decorator that gives the rule back.
    :raises ValueError: If the name is taken.
    """

    def register(rule: SelectionRule) -> SelectionRule:
        if _RULES.get(name, rule) is not rule:
            raise ValueError(f"There is a selection rule {name!r} already; choose another name.")
        _RULES[name] = rule
        return rule

    return register


def selection_rules() -> tuple[str, ...]:
    """
    Give the names of the rules.

    :return: In the order they were registered in.
    """
    return tuple(_RULES)


def as_rule(selection: object) -> SelectionRule:
    """
    Give the rule that a user means.

    :param selection: The name of one, a function, or the names of layers, which are then always chosen.
    :return: The rule.
    :raises ValueError: If there is none of that name.
    :raises TypeError: If it is something else.
    """
    if isinstance(selection, str):
        if selection not in _RULES:
            raise ValueError(
                f"`selection` must be one of {', '.join(map(repr, _RULES))}, a list of layers' names, or a function, "
                f"got {selection!r}."
            )
        return _RULES[selection]
    if isinstance(selection, (list, tuple)) and selection and all(isinstance(name, str) for name in selection):
        return _fixed(selection)
    if callable(selection):
        return selection
    raise TypeError(
        f"`selection` must be the name of a rule, a list of layers' names, or a function, got {selection!r}."
    )


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


def choose(rule: SelectionRule, candidates: Candidates, budget: Budget) -> list[Layer]:
    """
    Choose layers by a rule, within a budget.

    :param rule: The rule.
    :param candidates: What it chooses from.
    :param budget: How many.
    :return: The chosen layers, in execution order; equal scores go to the earlier layer.
    :raises ValueError: If the rule gives another number of scores, or no eligible layer that fits a score.
    """
    layers, eligible, network = candidates.layers, set(candidates.eligible), candidates.network
    scored = torch.tensor([float(score) for score in rule(candidates)], dtype=torch.float64, device=network.device)
    if len(scored) != len(layers):
        raise ValueError(f"`selection`: the rule gave {len(scored)} scores for {len(layers)} layers.")
    scores = dict(zip(layers, network.ranks.first(scored).tolist(), strict=True))
    usable = [layer for layer in layers if layer in eligible and scores[layer] > -math.inf]
    if not usable:
        raise ValueError(
            "No layer has a finite score: the perturbation reaches none of their features, or the rule scores none."
        )
    always = [layer for layer in usable if scores[layer] == math.inf]
    ranked = sorted((layer for layer in usable if layer not in always), key=lambda layer: scores[layer], reverse=True)
    nb_parameters = sum(p.numel() for p in network.model.parameters())
    chosen = {*always, *budget.take(ranked, layers, nb_parameters)}
    if not chosen:
        raise ValueError(
            f"`budget`: no layer that the rule scores fits into {budget.parameter_share:g} of the parameters."
        )
    return [layer for layer in layers if layer in chosen]


@register_selection_rule("criticality")
def _criticality(candidates: Candidates) -> list[float]:
    """CLAT's criticality index, eq. 3 (arXiv 2408.10204)."""
    return [entry.criticality for entry in candidates.criticality]


@register_selection_rule("relative_criticality")
def _relative_criticality(candidates: Candidates) -> list[float]:
    """The criticality index of relative errors, which neither width nor scale of a layer changes."""
    return [entry.relative_criticality for entry in candidates.criticality]


@register_selection_rule("relative_error")
def _relative_error(candidates: Candidates) -> list[float]:
    """The relative error of a layer's features, by which LSA finds vulnerable layers (arXiv 2202.02626)."""
    return [entry.relative_error for entry in candidates.criticality]


#: Radius of the weight perturbation in RiFT's module robust criticality, relative to the weights' own length, and the
#: steps of gradient ascent towards the worst one, as in its authors' code.
MODULE_RADIUS, MODULE_STEPS = 0.1, 10


def _loss_rises(candidates: Candidates) -> list[float]:
    """How far the adversarial loss rises under the worst perturbation of a layer's weights, layer by layer."""
    before, rises = candidates.adversarial_loss(), []  # ten steps for every layer: by far the dearest rule
    for layer in candidates.layers:
        if layer not in candidates.eligible:
            rises.append(math.nan)
            continue
        parameters = [p for p in layer.parameters() if p.ndim > 1] or layer.parameters()
        with _put_back(parameters) as originals, torch.no_grad():
            radius, highest = MODULE_RADIUS * _length(originals), before
            for _ in range(MODULE_STEPS):
                with torch.enable_grad():
                    gradients = candidates.gradients(parameters)
                step = radius / max(_length(gradients), 1e-12)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.add_(step * gradient)
                moved = [p - original for p, original in zip(parameters, originals, strict=True)]
                scale = min(1.0, radius / max(_length(moved), 1e-12))
                for parameter, original, delta in zip(parameters, originals, moved, strict=True):
                    parameter.copy_(original + scale * delta)
                highest = max(highest, candidates.adversarial_loss())
        rises.append(highest - before)
    return rises


@register_selection_rule("module_robustness_highest")
def _module_robustness_highest(candidates: Candidates) -> list[float]:
    """The layers whose module robust criticality (RiFT, arXiv 2308.02533) is highest: the loss depends on them most."""
    return _loss_rises(candidates)


@register_selection_rule("module_robustness_lowest")
def _module_robustness_lowest(candidates: Candidates) -> list[float]:
    """The layers whose module robust criticality is lowest, which RiFT fine-tunes (arXiv 2308.02533)."""
    return [-rise for rise in _loss_rises(candidates)]


#: Weight of the clean gradient in CURE's prominence; that of the adversarial one is the rest.
CLEAN_SHARE = 0.1


@register_selection_rule("gradient_prominence")
def _gradient_prominence(candidates: Candidates) -> list[float]:
    """
    CURE's robust gradient prominence (arXiv 2401.14948), averaged over a layer's parameters.

    It weighs a parameter's clean and adversarial gradients; here by their magnitude, as a layer's sum of signed ones
    would cancel.
    """
    owned = [layer.parameters() for layer in candidates.layers]
    parameters = list(dict.fromkeys(p for group in owned for p in group))
    clean, adversarial = (candidates.gradients(parameters, adversarial=which) for which in (False, True))
    prominence = {
        p: (CLEAN_SHARE * one + (1 - CLEAN_SHARE) * other).abs().sum()
        for p, one, other in zip(parameters, clean, adversarial, strict=True)
    }
    return [float(sum(prominence[p] for p in group)) / sum(p.numel() for p in group) for group in owned]


@register_selection_rule("random")
def _random(candidates: Candidates) -> list[float]:
    """Layers drawn anew at every selection: the control."""
    return list(np.random.default_rng([candidates.seed, candidates.round]).uniform(size=len(candidates.layers)))


@register_selection_rule("random_fixed")
def _random_fixed(candidates: Candidates) -> list[float]:
    """Layers drawn once a run."""
    return list(np.random.default_rng([candidates.seed]).uniform(size=len(candidates.layers)))


@register_selection_rule("first")
def _first(candidates: Candidates) -> list[float]:
    """The layers that run first."""
    return [-float(number) for number in range(len(candidates.layers))]


@register_selection_rule("last")
def _last(candidates: Candidates) -> list[float]:
    """The layers that run last."""
    return [float(number) for number in range(len(candidates.layers))]


@register_selection_rule("all")
def _all(candidates: Candidates) -> list[float]:
    """Every eligible layer, whatever the budget."""
    return [math.inf] * len(candidates.layers)


def _fixed(names: Sequence[str]) -> SelectionRule:
    def fixed(candidates: Candidates) -> list[float]:
        check_names(names, candidates.eligible)
        return [math.inf if layer.name in names else -math.inf for layer in candidates.layers]

    return fixed


@contextmanager
def _put_back(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    """Give copies of parameters, and put these back on leaving."""
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        yield originals
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.detach().double().norm() for tensor in tensors]).norm())
