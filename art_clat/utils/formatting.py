"""Quantities as text, written the same way everywhere."""

from __future__ import annotations

import math


def format_eps(eps: float, norm: str) -> str:
    """
    Write ε as RobustBench does.

    :param eps: In units of inputs in [0, 1].
    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    :return: For ``Linf`` a fraction of 255 where it is one, e.g. ``"8/255"``; else the number.
    """
    pixels = eps * 255
    in_pixels = norm == "Linf" and math.isclose(pixels, round(pixels), rel_tol=0, abs_tol=1e-6)
    return f"{round(pixels)}/255" if in_pixels else f"{eps:g}"
