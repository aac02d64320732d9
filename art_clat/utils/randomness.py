"""Seed the global random generators, and put them back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """
    Seed the global random generators, and put them back on leaving.

    They are those of Python, NumPy and torch, and CUDA's on a GPU. Dropout, random starts and ART's attacks draw from
    them.

    :param seed: The seed, 0 … 2**32 − 1.
    :param device: The device that the network runs on.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            reseed(device, seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def reseed(device: torch.device, *counters: int) -> None:
    """
    Seed the global random generators with numbers that say where in a run it is.

    What a batch draws then depends on the seed, the epoch and the batch alone. So a run that is resumed draws the same
    numbers as one without a break, and every process draws the same numbers.

    :param device: The device that the network runs on.
    :param counters: Whole numbers of at least 0, such as seed, epoch and batch.
    """
    python, numpy, one, other = (
        int(word) for word in np.random.SeedSequence([len(counters), *counters]).generate_state(4)
    )
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(one << 32 | other)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(one << 32 | other)


def drawn_by_image(indices: torch.Tensor, count: int, *counters: int) -> torch.Tensor:
    """
    Draw numbers for each image that follow from its index and from `counters` alone, without a loop over the images.

    :param indices: The images' indices in the data set, shape (n,).
    :param count: How many numbers to draw for each.
    :param counters: Whole numbers of at least 0, such as seed and epoch.
    :return: Whole numbers from 0 to 2**31 − 1, shape (n, count), on the device of `indices`. Their remainders by a
             small number are as good as uniform.
    """
    words = np.random.SeedSequence([len(counters), *counters]).generate_state(count, np.uint64).view(np.int64)
    streams = torch.stack([indices * _ODD + int(word) for word in words], dim=1)
    return _shifted(_mixed(_mixed(streams)), 33)


#: 2**64 divided by the golden ratio, as a signed number.
_ODD = -7046029254386353131


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """Mix the bits of 64-bit numbers: the last steps of SplitMix64 (Steele et al., OOPSLA 2014)."""
    z = (z ^ _shifted(z, 30)) * -4658895280553007687
    z = (z ^ _shifted(z, 27)) * -7723592293110705685
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """Shift 64-bit numbers to the right, and fill up with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)
