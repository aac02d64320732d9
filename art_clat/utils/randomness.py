"""Seed the global random generators, and put them back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """
    Seed the global random generators, and put them back as they were on leaving.

    They are Python's, NumPy's, torch's and, on a GPU, CUDA's: dropout, random starts and ART's own attacks all draw
    from these.

    :param seed: The seed, 0 … 2**32 − 1.
    :param device: Where the network runs.
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
    Seed the global random generators with numbers that say where a run stands.

    What is drawn at random in a batch then follows from the seed, the epoch and the batch alone: a run that is
    continued draws what it would have drawn, and so does every process of several.

    :param device: Where the network runs.
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
