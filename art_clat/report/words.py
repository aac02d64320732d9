"""How the page writes numbers, names and facts."""

from __future__ import annotations

import re

from markupsafe import Markup

from art_clat.utils.formatting import format_eps

#: Norms as the page writes them.
NORMS = {"Linf": "ℓ∞", "L2": "ℓ2", "L1": "ℓ1"}


def percent(value: float | None) -> str:
    """
    Write an accuracy.

    :param value: In [0, 1], or `None`.
    :return: E.g. ``"52.30 %"``.
    """
    return "–" if value is None else f"{100 * value:.2f} %"


def breakable(name: str) -> Markup:
    """
    Let a long name continue in the next line after a slash or an underscore.

    :param name: The name.
    :return: HTML.
    """
    return Markup("<wbr>").join(re.split(r"(?<=[/_])", name))


def text(value: object, key: str = "") -> str:
    """
    Write a fact in one line; ε and its steps as quotients of 255 if they are.

    :param value: Anything that JSON holds.
    :param key: What the fact is called.
    :return: The line.
    """
    if isinstance(value, dict):
        return ", ".join(f"{name} {text(item, str(name))}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(text(item, key) for item in value)
    if isinstance(value, float) and re.match(r"eps(_|$)", key):
        return format_eps(value, "Linf")
    return "–" if value is None else str(value)
