"""What the plots of this package share. Figures are made without pyplot: no global state, no window."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: More names than this on one axis cannot be read; every second, third, ... is shown then.
MOST_LABELS = 60


def new_axes(*, width: float, height: float) -> Axes:
    """
    Make a figure with one pair of axes.

    :param width: In inches.
    :param height: In inches.
    :return: The axes; their figure is ``axes.figure``.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def label_layers(axis: Axis, names: Sequence[str], *, rotation: float = 0) -> None:
    """
    Write layer names along an axis, as many as can be read.

    :param axis: ``axes.xaxis`` or ``axes.yaxis``; position ``i`` belongs to layer ``i``.
    :param names: The layers' names.
    :param rotation: Of the text, in degrees.
    """
    every = -(-len(names) // MOST_LABELS)
    axis.set_ticks(range(0, len(names), every), list(names[::every]), rotation=rotation, fontsize=8)


def save(axes: Axes, path: str | os.PathLike[str]) -> None:
    """
    Write the figure that axes belong to.

    :param axes: Any of the figure's axes.
    :param path: File name; its ending gives the format (``.png``, ``.svg``, ``.pdf``).
    """
    cast("Figure", axes.figure).savefig(path, dpi=150)
