"""How many layers are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from art_clat.layers.layer import Layer
from art_clat.utils.checks import check_share, check_whole


@dataclass(frozen=True)
class Budget:
    """
    How many layers are chosen: a share of them, a number, or as many as a share of the parameters pays for.

    Exactly one of the three is given. At least one layer is chosen in any case but the last: where not even the
    smallest layer fits, :meth:`fits_any` says so.

    :param share: Share of all layers, in (0, 1], rounded.
    :param count: Number of layers, at least 1.
    :param parameter_share: Share of the network's scalar parameters, in (0, 1]: layers are taken from the best
           downwards, those passed over that would exceed it.
    :raises ValueError: If none or several are given, or one is out of its range.
    """

    share: float | None = None
    count: int | None = None
    parameter_share: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"`Budget` takes one of share, count and parameter_share, got {given or 'none'}.")
        for name, value in given.items():
            if name == "count":
                check_whole(value, 1, argument=name)
            else:
                check_share(value, argument=name)

    def take(self, ranked: Sequence[Layer], layers: Sequence[Layer], nb_parameters: int) -> list[Layer]:
        """
        Take the best layers.

        :param ranked: The layers to take from, best first.
        :param layers: All layers.
        :param nb_parameters: The network's scalar parameters.
        :return: Those taken, best first.
        """
        if self.parameter_share is None:
            return list(ranked[: self.count or max(1, round((self.share or 0) * len(layers)))])
        taken: list[Layer] = []
        left = self.parameter_share * nb_parameters
        for layer in ranked:
            if layer.nb_parameters <= left:
                taken.append(layer)
                left -= layer.nb_parameters
        return taken

    def fits_any(self, eligible: Sequence[Layer], nb_parameters: int) -> bool:
        """
        Tell whether at least one layer fits.

        :param eligible: The layers that may be chosen.
        :param nb_parameters: The network's scalar parameters.
        :return: Whether one does.
        """
        share = self.parameter_share
        return share is None or min(layer.nb_parameters for layer in eligible) <= share * nb_parameters
