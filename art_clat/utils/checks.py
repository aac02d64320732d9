"""Checks of numbers that a user passes in."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch


def check_not_in_inference_mode(function: str) -> None:
    """Refuse to compute gradients where torch has none; ``torch.no_grad`` is no obstacle."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"`{function}` needs gradients, which `torch.inference_mode()` rules out: call it outside of that."
        )


def check_at_least(value: float, minimum: float, *, argument: str) -> None:
    """Refuse a value that is not a finite number of at least `minimum`."""
    if not (is_number(value) and np.isfinite(value) and value >= minimum):
        raise ValueError(f"`{argument}` must be a finite number of at least {minimum}, got {value!r}.")


def is_number(value: object) -> bool:
    """Return whether a value is a number; a bool is not one."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def check_whole(value: object, minimum: int, *, argument: str) -> None:
    """Refuse a value that is not a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"`{argument}` must be a whole number of at least {minimum}, got {value!r}.")


def check_seed(value: object) -> None:
    """Refuse a seed that NumPy's and torch's generators do not take: not a whole number in 0 … 2**32 − 1."""
    check_whole(value, 0, argument="seed")
    if int(value) >= 2**32:  # type: ignore[call-overload]
        raise ValueError(f"`seed` must be a whole number below 2**32, got {value}.")


def check_share(value: float, *, argument: str) -> None:
    """Refuse a value that is not a number in (0, 1]."""
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"`{argument}` must be a number in (0, 1], got {value!r}.")


def check_choice(value: object, accepted: Collection[str], *, argument: str) -> None:
    """Refuse a value that is not one of the accepted names."""
    if value not in accepted:
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, accepted))}, got {value!r}.")
