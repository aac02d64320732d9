"""The perturbations that attacks have found, kept for the next epoch and, beside a checkpoint, for a resumed run."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from art_clat.attacks.balls import Ball, LinfBall
from art_clat.utils.batch import Batch
from art_clat.utils.memory import available_memory
from art_clat.utils.processes import Ranks

#: Rows that are sent, or written, at once.
ROWS = 1024

#: Bytes of a file's header.
HEADER = 512


class Perturbations:
    """
    The last perturbation of every training image, as a share of ε.

    In ℓ∞ a share is an 8-bit number, otherwise a 16-bit one. Each perturbation has a stamp: the number of the batch, in
    the whole run and from 1, whose attack has found it. Stamp 0 means that there is none.

    :param shape: Shape of the training images, (n, *input_shape).
    :param ball: The attack's ball.
    :param device: Where the shares are kept.
    """

    def __init__(self, shape: tuple[int, ...], ball: Ball, device: torch.device) -> None:
        self.dtype = torch.int8 if isinstance(ball, LinfBall) else torch.float16
        self.shares = torch.zeros(shape, dtype=self.dtype, device=device)
        self.stamps = torch.zeros(shape[0], dtype=torch.int64)

    @staticmethod
    def bytes_of(shape: tuple[int, ...], ball: Ball) -> int:
        """Return how much memory the perturbations of so many images take."""
        return int(np.prod(shape, dtype=object)) * (1 if isinstance(ball, LinfBall) else 2) + 8 * shape[0]

    def known(self, batch: Batch) -> torch.Tensor:
        """Return which images of a batch have a perturbation, shape (n,), on the CPU."""
        return self.stamps[batch.index] > 0

    def get(self, index: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return images' shares, shape (n, *input_shape)."""
        return self.shares[index.to(self.shares.device, non_blocking=True)].to(device, non_blocking=True)

    def put(self, index: torch.Tensor, shares: torch.Tensor, stamp: int) -> None:
        """Keep images' shares."""
        self.shares[index.to(self.shares.device, non_blocking=True)] = shares.to(self.shares.device)
        self.stamps[index] = stamp

    def encoded(self, delta: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
        """Turn perturbations into shares of ε; an element whose ε is 0 has the share 0."""
        share = torch.nan_to_num(delta / eps, nan=0.0, posinf=0.0, neginf=0.0)
        return (share * 127).round().clamp(-127, 127).to(torch.int8) if self.dtype == torch.int8 else share.half()

    def decoded(self, shares: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
        """Turn shares of ε into perturbations."""
        return shares.float() * (eps / 127 if self.dtype == torch.int8 else eps)

    def exchange(self, since: int, ranks: Ranks) -> None:
        """
        Give all processes what one of them has found.

        :param since: The stamp after which perturbations are new. An image is perturbed in one process in that time.
        :param ranks: The processes.
        """
        if ranks.size == 1:
            return
        device = self.shares.device
        mine = self.stamps > since
        stamps = ranks.sum(torch.where(mine, self.stamps, 0).to(device)).cpu()
        for rows in torch.nonzero(stamps)[:, 0].split(ROWS):
            places, own = rows.to(device), mine[rows].to(device).view(-1, *[1] * (self.shares.ndim - 1))
            self.shares[places] = ranks.sum(torch.where(own, self.shares[places], 0))
        self.stamps = torch.where(stamps > 0, stamps, self.stamps)


@dataclass(frozen=True)
class _File:
    """
    A file of perturbations: a header, the stamps, the shares.

    :param path: The file.
    :param identity: What the header must say.
    :param shape: Shape of the shares.
    :param dtype: Their type.
    """

    path: Path
    identity: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return HEADER + 8 * self.shape[0] + int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    @property
    def header(self) -> bytes:
        """What the file begins with."""
        said = {"art_clat": "perturbations", "run": self.identity, "shape": self.shape, "type": str(self.dtype)}
        return json.dumps(said).encode().ljust(HEADER)

    def create(self) -> None:
        """Make the file anew, without a perturbation, and reserve its place on the disk."""
        with self.path.open("wb") as file:
            file.write(self.header)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.size)
            file.truncate(self.size)

    def check(self) -> None:
        """Refuse a file that is missing, incomplete or of another run."""
        if not self.path.exists():
            raise _unusable(self.path, "is missing")
        if (size := self.path.stat().st_size) != self.size:
            raise _unusable(self.path, f"has {size:,} bytes instead of {self.size:,}")
        with self.path.open("rb") as file:
            if file.read(HEADER) != self.header:
                raise _unusable(self.path, "is of another run, or of other data")

    def stamps(self) -> np.memmap[Any, np.dtype[np.int64]]:
        """Map the stamps."""
        return np.memmap(self.path, np.int64, "r+", HEADER, self.shape[:1])

    def shares(self) -> np.memmap[Any, np.dtype[np.generic]]:
        """Map the shares."""
        return np.memmap(self.path, self.dtype, "r+", HEADER + 8 * self.shape[0], self.shape)


class PerturbationFiles:
    """
    Two files of perturbations in a checkpoint's folder: one is complete since the last epoch, one grows in this epoch.

    An epoch's end completes the growing file before the checkpoint is saved. The next epoch writes to the other file,
    and only after that. So whatever the checkpoint says, the perturbations of its batch are there.

    :param folder: The checkpoint's folder.
    :param identity: Names the run, its data included, with at most 64 characters.
    :param kept: What is saved.
    """

    def __init__(self, folder: Path, identity: str, kept: Perturbations) -> None:
        self._kept = kept
        shape, dtype = tuple(kept.shares.shape), np.dtype(np.int8 if kept.dtype == torch.int8 else np.float16)
        self._files = [_File(folder / f"perturbations-{number}.bin", identity, shape, dtype) for number in (0, 1)]
        self._saved = 0

    def create(self) -> None:
        """
        Make the files anew.

        :raises OSError: If the disk is too small.
        """
        folder, needed = self._files[0].path.parent, sum(file.size for file in self._files)
        there = sum(file.path.stat().st_size for file in self._files if file.path.exists())
        if (free := shutil.disk_usage(folder).free + there) < needed:
            raise OSError(
                f"`checkpoint`: the perturbations take {needed:,} bytes in {folder}, and {free:,} are free. Pass "
                "another folder, or `reuse_perturbations=None` to the trainer."
            )
        for file in self._files:
            file.create()

    def load_epochs(self, epoch: int, nb_batches: int) -> None:
        """
        Load what was there before an epoch, which is not the first one that keeps perturbations.

        :param epoch: The epoch, from 0.
        :param nb_batches: Number of batches in an epoch.
        :raises ValueError: If a file is missing, incomplete, or of another run or another time.
        """
        file, end = self._files[(epoch - 1) % 2], epoch * nb_batches
        file.check()
        stamps = file.stamps()
        latest = int(stamps.max(initial=0))
        if latest != end:
            raise _unusable(file.path, f"is of another time: its last batch is {latest}, not {end}")
        self._take(file, np.flatnonzero(stamps))
        self._saved = end

    def load_batches(self, stamp: int, nb_batches: int) -> None:
        """
        Load what the epoch's batches up to one have found.

        :param stamp: The number of that batch, in the whole run and from 1.
        :param nb_batches: Number of batches in an epoch.
        :raises ValueError: If the file is of another time.
        """
        epoch, batch = divmod(stamp, nb_batches)
        if not batch:
            return
        file = self._files[epoch % 2]
        file.check()
        stamps = file.stamps()
        rows = np.flatnonzero((stamps > epoch * nb_batches) & (stamps <= stamp))
        if not len(rows):
            raise _unusable(file.path, f"is of another time: it has nothing of epoch {epoch}")
        self._take(file, rows)
        self._saved = stamp

    def save(self, stamp: int, nb_batches: int) -> None:
        """
        Save what is there after a batch, and wait until it is on the disk.

        :param stamp: The number of the batch, in the whole run and from 1.
        :param nb_batches: Number of batches in an epoch.
        """
        epoch = (stamp - 1) // nb_batches
        changed = self._kept.stamps > self._saved
        if stamp % nb_batches == 0:  # what this epoch has not visited moves along
            changed |= (self._kept.stamps > 0) & (self._kept.stamps <= epoch * nb_batches)
        file = self._files[epoch % 2]
        stamps, shares = file.stamps(), file.shares()
        for rows in torch.nonzero(changed)[:, 0].split(ROWS):
            shares[rows.numpy()] = self._kept.get(rows, torch.device("cpu")).numpy()
        stamps[changed.numpy()] = self._kept.stamps[changed].numpy()
        shares.flush()
        stamps.flush()
        self._saved = stamp

    def _take(self, file: _File, rows: npt.NDArray[np.intp]) -> None:
        stamps, shares = file.stamps(), file.shares()
        for some in np.array_split(rows, max(1, len(rows) // ROWS)):
            index = torch.from_numpy(some)
            self._kept.shares[index.to(self._kept.shares.device)] = torch.from_numpy(shares[some]).to(
                self._kept.shares.device
            )
            self._kept.stamps[index] = torch.from_numpy(stamps[some])


def place_for(needed: int, device: torch.device, share: float) -> torch.device | None:
    """
    Choose where to keep so many bytes: on the GPU if they take less than `share` of its free memory, or on the CPU.

    :return: The device; `None` if they do not fit anywhere.
    """
    if device.type == "cuda" and needed < share * torch.cuda.mem_get_info(device)[0]:
        return device
    free = available_memory()
    return None if free is not None and needed > free else torch.device("cpu")


def _unusable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"`checkpoint`: {path}, from which the run's attacks go on, {why}. No file is changed. Use another folder to "
        "begin a new run; `last.safetensors` beside it has the weights."
    )
