"""Rules that score layers: criticality (eq. 3), its rivals, and the controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from art_clat.config import RuleLike
from art_clat.selection.candidates import Candidates
from art_clat.selection.choice import check_names
from art_clat.utils.checks import check_choice
from art_clat.utils.weights import move, perturbable, put_back

#: A function that returns one score a layer, in execution order. The eligible layers with the highest scores are
#: chosen, as many as the budget allows. Infinity chooses a layer whatever the budget, NaN and minus infinity never do.
SelectionRule = Callable[[Candidates], Sequence[float]]

#: The rules by name.
SELECTION_RULES: dict[str, SelectionRule] = {}


def register_selection_rule(name: str) -> Callable[[SelectionRule], SelectionRule]:
    """
    Register a rule under a name that the trainer's ``selection=`` accepts.

    Example::

        @register_selection_rule("smallest")
        def smallest(candidates):
            return [-layer.nb_parameters for layer in candidates.layers]

    A rule is a function of :class:`art_clat.Candidates`. It returns one score a layer; the eligible layers with the
    highest scores are chosen, as many as the budget allows. Infinity chooses a layer whatever the budget, NaN and minus
    infinity never do.

    :param name: The name; it must not be taken.
    :return: A decorator that returns the rule unchanged.
    :raises ValueError: If the name is taken.
    """

    def register(rule: SelectionRule) -> SelectionRule:
        if SELECTION_RULES.get(name, rule) is not rule:
            raise ValueError(f"There is already a selection rule {name!r}; choose another name.")
        SELECTION_RULES[name] = rule
        return rule

    return register


def list_selection_rules() -> list[str]:
    """
    List the rules that the trainer's ``selection=`` accepts by name.

    >>> list_selection_rules()[:3]
    ['criticality', 'criticality_rms', 'relative_criticality']

    :return: The names, in the order of registration.
    """
    return list(SELECTION_RULES)


def as_rule(selection: RuleLike) -> SelectionRule:
    """Return the rule that a user names or passes; names of layers become a rule that always chooses these."""
    if isinstance(selection, str):
        check_choice(selection, SELECTION_RULES, argument="selection")
        return SELECTION_RULES[selection]
    return selection if callable(selection) else _fixed(selection)


@register_selection_rule("criticality")
def _criticality(candidates: Candidates) -> list[float]:
    """CLAT's criticality index, eq. 3 (arXiv 2408.10204)."""
    return [entry.criticality for entry in candidates.criticality]


@register_selection_rule("criticality_rms")
def _criticality_rms(candidates: Candidates) -> list[float]:
    """Eq. 3 with the root mean square of a feature's change, which does not depend on the feature's size."""
    return [entry.rms_criticality for entry in candidates.criticality]


@register_selection_rule("relative_criticality")
def _relative_criticality(candidates: Candidates) -> list[float]:
    """The index of relative errors: neither the width nor the scale of a layer changes it."""
    return [entry.relative_criticality for entry in candidates.criticality]


@register_selection_rule("relative_error")
def _relative_error(candidates: Candidates) -> list[float]:
    """The relative error of a layer's feature, by which LSA finds vulnerable layers (arXiv 2202.02626)."""
    return [entry.relative_error for entry in candidates.criticality]


#: Radius of the weight perturbation in RiFT's module robust criticality, relative to the length of the weights, and the
#: steps of gradient ascent towards the worst perturbation; both as in its authors' code.
MODULE_RADIUS, MODULE_STEPS = 0.1, 10


def _loss_rises(candidates: Candidates) -> list[float]:
    """Return how much the worst perturbation of each layer's weights raises the adversarial loss."""
    before, rises = candidates.adversarial_loss(), []  # ten steps a layer: by far the slowest rule
    for layer in candidates.layers:
        if layer not in candidates.eligible:
            rises.append(math.nan)
            continue
        parameters = [p for p in layer.parameters() if p.ndim > 1] or layer.parameters()
        with put_back(parameters) as originals, torch.no_grad():
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
    """The layers with the highest module robust criticality (RiFT, arXiv 2308.02533): the loss depends on them most."""
    return _loss_rises(candidates)


@register_selection_rule("module_robustness_lowest")
def _module_robustness_lowest(candidates: Candidates) -> list[float]:
    """The layers with the lowest module robust criticality, which RiFT fine-tunes (arXiv 2308.02533)."""
    return [-rise for rise in _loss_rises(candidates)]


#: Length of the weight perturbation that sharpness is measured with, relative to each weight tensor's: the γ of
#: ``preset="safer"``.
SHARPNESS_RADIUS = 0.01


@register_selection_rule("sharpness")
def _sharpness(candidates: Candidates) -> list[float]:
    """
    The layers in whose weights the adversarial loss is sharpest, by which SAFER chooses (arXiv 2501.01529).

    It is the rise of the loss, on the same adversarial examples, when the weights of one layer have moved along their
    gradient as before a step with ``weight_perturbation=0.01``. As in sharpness-aware minimisation, one step of ascent
    stands for the worst perturbation.
    """
    weights = set(perturbable(candidates.classifier.model))
    moved = {
        layer: [p for p in layer.parameters() if p in weights] or layer.parameters() for layer in candidates.eligible
    }
    every = list(dict.fromkeys(parameter for group in moved.values() for parameter in group))
    gradients = dict(zip(every, candidates.gradients(every), strict=True))  # every layer's climb begins at one point
    before, rises = candidates.adversarial_loss(), []
    for layer in candidates.layers:
        group = moved.get(layer, [])
        with put_back(group):
            move(group, [gradients[parameter] for parameter in group], SHARPNESS_RADIUS)
            rises.append(candidates.adversarial_loss() - before if group else math.nan)
    return rises


#: Weight of the clean gradient in CURE's prominence. The adversarial gradient has the rest.
CLEAN_SHARE = 0.1


@register_selection_rule("gradient_prominence")
def _gradient_prominence(candidates: Candidates) -> list[float]:
    """
    CURE's robust gradient prominence (arXiv 2401.14948), averaged over a layer's parameters.

    It is the weighted sum of a parameter's clean and adversarial gradients. Here its magnitude is averaged: signed sums
    would cancel within a layer.
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
    """Random layers, drawn anew at every selection: the control."""
    return list(np.random.default_rng([candidates.seed, candidates.round]).uniform(size=len(candidates.layers)))


@register_selection_rule("random_fixed")
def _random_fixed(candidates: Candidates) -> list[float]:
    """Random layers, drawn once a run."""
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
    """Return a rule that always chooses the layers of these names, and no others."""

    def fixed(candidates: Candidates) -> list[float]:
        check_names(names, candidates.eligible)
        return [math.inf if layer.name in names else -math.inf for layer in candidates.layers]

    return fixed


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.detach().double().norm() for tensor in tensors]).norm())
