"""Take as many of the best layers as a budget pays for."""

from __future__ import annotations

from collections.abc import Sequence

from art_clat.config import Budget
from art_clat.layers.layer import Layer


def take_layers(budget: Budget, ranked: Sequence[Layer], *, nb_layers: int, nb_parameters: int) -> list[Layer]:
    """
    Take the best layers that a budget pays for.

    :param budget: The budget.
    :param ranked: The layers to take from, best first.
    :param nb_layers: Number of all layers of the network.
    :param nb_parameters: Number of the network's scalar parameters.
    :return: Those taken, best first. At least one for ``share`` and ``count``; none if not even the smallest fits into
             ``parameter_share``.
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
    """
    Refuse a budget that pays for no layer.

    :param budget: The budget.
    :param eligible: The layers that may be chosen.
    :param nb_parameters: Number of the network's scalar parameters.
    :raises ValueError: If the smallest layer exceeds the share of the parameters.
    """
    smallest = min(eligible, key=lambda layer: layer.nb_parameters)
    if budget.parameter_share is not None and smallest.nb_parameters > budget.parameter_share * nb_parameters:
        raise ValueError(
            f"`budget` {budget} pays for no layer: the smallest that may be chosen, {smallest.name}, has "
            f"{smallest.nb_parameters:,} parameters."
        )
