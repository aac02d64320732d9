"""Rules that score layers: criticality (eq. 3), its rivals, and the controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from art_clat.config import RuleLike
from art_clat.selection.candidates import Candidates
from art_clat.selection.choice import check_names
from art_clat.utils.checks import check_choice

#: Returns one score a layer, in their order. The eligible layers with the highest are chosen, as many as the budget
#: pays for; those with infinity whatever the budget, those with NaN or minus infinity never.
SelectionRule = Callable[[Candidates], Sequence[float]]

#: The rules by name.
SELECTION_RULES: dict[str, SelectionRule] = {}


def register_selection_rule(name: str) -> Callable[[SelectionRule], SelectionRule]:
    """
    Make a rule known by a name, for the trainer's ``selection=``.

    Example::

        @register_selection_rule("smallest")
        def smallest(candidates):
            return [-layer.nb_parameters for layer in candidates.layers]

    :param name: The name.
    :return: A decorator that returns the rule unchanged.
    :raises ValueError: If the name is taken.
    """

    def register(rule: SelectionRule) -> SelectionRule:
        if SELECTION_RULES.get(name, rule) is not rule:
            raise ValueError(f"There is a selection rule {name!r} already; choose another name.")
        SELECTION_RULES[name] = rule
        return rule

    return register


def list_selection_rules() -> list[str]:
    """
    List the names that the trainer's ``selection=`` accepts.

    >>> list_selection_rules()[:3]
    ['criticality', 'relative_criticality', 'relative_error']

    :return: The names, in the order of registration.
    """
    return list(SELECTION_RULES)


def as_rule(selection: RuleLike) -> SelectionRule:
    """
    Return the rule that a user means.

    :param selection: The name of a rule, a function, or names of layers, which are then always chosen.
    :return: The rule.
    :raises ValueError: If there is no rule of that name.
    """
    if isinstance(selection, str):
        check_choice(selection, SELECTION_RULES, argument="selection")
        return SELECTION_RULES[selection]
    return selection if callable(selection) else _fixed(selection)


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
    """Yield copies of parameters, and put these back on leaving."""
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        yield originals
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.detach().double().norm() for tensor in tensors]).norm())
