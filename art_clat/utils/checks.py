"""Checks of numbers that a user passes in."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np


def check_at_least(value: float, minimum: float, *, argument: str) -> None:
    """
    Refuse a number below a minimum, NaN and infinity included.

    :param value: What the user passed.
    :param minimum: The smallest accepted value.
    :param argument: Name of the argument, for the message.
    :raises ValueError: If it is smaller or not finite.
    """
    if not (is_number(value) and np.isfinite(value) and value >= minimum):
        raise ValueError(f"`{argument}` must be a number of at least {minimum}, got {value!r}.")


def is_number(value: object) -> bool:
    """
    Tell whether a value is a number, which a truth value is not.

    :param value: What the user passed.
    :return: Whether it is.
    """
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def check_whole(value: object, minimum: int, *, argument: str) -> None:
    """
    Refuse what is not a whole number of at least a minimum.

    :param value: What the user passed.
    :param minimum: The smallest accepted value.
    :param argument: Name of the argument, for the message.
    :raises ValueError: If it is not a whole number or smaller.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"`{argument}` must be a whole number of at least {minimum}, got {value!r}.")


def check_seed(value: object) -> None:
    """
    Refuse what cannot seed NumPy's and torch's generators.

    :param value: What the user passed as ``seed``.
    :raises ValueError: If it is not a whole number in 0 … 2**32 − 1.
    """
    check_whole(value, 0, argument="seed")
    if int(value) >= 2**32:  # type: ignore[call-overload]
        raise ValueError(f"`seed` must be below 2**32, got {value}.")


def check_share(value: float, *, argument: str) -> None:
    """
    Refuse a number outside (0, 1].

    :param value: What the user passed.
    :param argument: Name of the argument, for the message.
    :raises ValueError: If it is outside.
    """
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"`{argument}` must be a number in (0, 1], got {value!r}.")


def check_choice(value: object, accepted: Collection[str], *, argument: str) -> None:
    """
    Refuse what is not one of some names.

    :param value: What the user passed.
    :param accepted: The names.
    :param argument: Name of the argument, for the message.
    :raises ValueError: If it is none of them.
    """
    if value not in accepted:
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, accepted))}, got {value!r}.")
