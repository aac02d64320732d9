"""What all plots of this package share. Figures are made without pyplot: no global state, no window."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Most names on one axis that can be read. Of more names only every second, third, ... is shown.
MOST_LABELS = 60


def new_axes(*, width: float, height: float) -> Axes:
    """Return the axes of a new figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def label_layers(axis: Axis, names: Sequence[str], *, rotation: float = 0) -> None:
    """Write layer names along an axis, as many as can be read; position ``i`` belongs to layer ``i``."""
    every = -(-len(names) // MOST_LABELS)
    axis.set_ticks(range(0, len(names), every), list(names[::every]), rotation=rotation, fontsize=8)


def save(axes: Axes, path: str | os.PathLike[str]) -> None:
    """Write the figure that axes belong to. The file name's ending sets the format: ``.png``, ``.svg`` or ``.pdf``."""
    cast("Figure", axes.figure).savefig(path, dpi=150)
