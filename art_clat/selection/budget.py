"""Take the best layers within a budget."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from art_clat.config import Budget
from art_clat.layers.layer import Layer

logger = logging.getLogger(__name__)

#: How far layers may exceed a share of the parameters: a layer of 5.3 % counts as one of 5 %.
TOLERANCE = 1.1


def take_layers(budget: Budget, ranked: Sequence[Layer], *, nb_layers: int, nb_parameters: int) -> list[Layer]:
    """
    Take the best layers within a budget; `ranked` lists the candidates, best first.

    ``share`` and ``count`` take at least one layer, and so does ``parameter_share`` if one fits.
    """
    if budget.count is not None:
        return list(ranked[: budget.count])
    if budget.share is not None:
        return list(ranked[: max(1, round(budget.share * nb_layers))])
    left = _limit(budget, nb_parameters)
    taken: list[Layer] = []
    too_large = [] if budget.fill else [layer for layer in ranked if layer.nb_parameters > left]
    for layer in (layer for layer in ranked if layer not in too_large):
        if layer.nb_parameters <= left:
            taken.append(layer)
            left -= layer.nb_parameters
        elif not budget.fill:
            break
    worst = ranked.index(taken[-1]) if taken else -1
    if passed_over := [layer.name for layer in too_large if ranked.index(layer) < worst]:
        logger.info("Larger than the budget %s, and passed over: %s.", budget, ", ".join(passed_over))
    return taken


def check_budget(budget: Budget, eligible: Sequence[Layer], nb_parameters: int) -> None:
    """Refuse a ``parameter_share`` that even the smallest eligible layer exceeds."""
    smallest = min(eligible, key=lambda layer: layer.nb_parameters)
    if budget.parameter_share is not None and smallest.nb_parameters > _limit(budget, nb_parameters):
        raise ValueError(
            f"`budget` {budget} pays for no layer: the smallest that may be chosen, {smallest.name}, has "
            f"{smallest.nb_parameters:,} of {nb_parameters:,} parameters. Use a larger share."
        )


def _limit(budget: Budget, nb_parameters: int) -> float:
    """Return how many parameters a share pays for."""
    return (budget.parameter_share or 0) * nb_parameters * (1 if budget.fill else TOLERANCE)
