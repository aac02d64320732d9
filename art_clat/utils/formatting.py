"""Quantities as text, written the same way everywhere."""

from __future__ import annotations

import math


def format_eps(eps: float, norm: str) -> str:
    """Write ε as RobustBench does: as a fraction such as ``"8/255"`` if it is one in ``Linf``, else as a number."""
    pixels = eps * 255
    in_pixels = norm == "Linf" and math.isclose(pixels, round(pixels), rel_tol=0, abs_tol=1e-6)
    return f"{round(pixels)}/255" if in_pixels else f"{eps:g}"
