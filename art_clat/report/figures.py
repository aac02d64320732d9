"""Drawings within a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes


@dataclass(frozen=True)
class Figure:
    """
    A drawing, ready for an ``img``.

    :param source: A ``data:`` address.
    :param alt: What it shows, in words.
    :param width: In CSS pixels.
    :param height: In CSS pixels.
    """

    source: str
    alt: str
    width: int
    height: int


def draw(plot: Callable[[], Axes], alt: str) -> Figure:
    """
    Make a figure.

    :param plot: Draws it.
    :param alt: What it shows, in words.
    :return: The figure, as SVG.
    """
    settings: dict[Any, Any] = {"svg.hashsalt": "art_clat", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        figure: Any = plot().figure
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return Figure(f"data:image/svg+xml;base64,{encoded}", alt, width, height)
