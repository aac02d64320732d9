"""Take the best layers within a budget."""

from __future__ import annotations

from collections.abc import Sequence

from art_clat.config import Budget
from art_clat.layers.layer import Layer


def take_layers(budget: Budget, ranked: Sequence[Layer], *, nb_layers: int, nb_parameters: int) -> list[Layer]:
    """
    Take the best layers within a budget; `ranked` lists the candidates, best first.

    ``share`` and ``count`` take at least one layer. ``parameter_share`` may take none: it passes over each layer that
    would exceed it.
    """
    if budget.count is not None:
        return list(ranked[: budget.count])
    if budget.share is not None:
        return list(ranked[: max(1, round(budget.share * nb_layers))])
    taken: list[Layer] = []
    left = (budget.parameter_share or 0) * nb_parameters
    for layer in ranked:
        if layer.nb_parameters <= left:
            taken.append(layer)
            left -= layer.nb_parameters
    return taken


def check_budget(budget: Budget, eligible: Sequence[Layer], nb_parameters: int) -> None:
    """Refuse a ``parameter_share`` that even the smallest eligible layer exceeds."""
    smallest = min(eligible, key=lambda layer: layer.nb_parameters)
    if budget.parameter_share is not None and smallest.nb_parameters > budget.parameter_share * nb_parameters:
        raise ValueError(
            f"`budget` {budget} pays for no layer: the smallest that may be chosen, {smallest.name}, has "
            f"{smallest.nb_parameters:,} of {nb_parameters:,} parameters. Use a larger share."
        )
