"""Save a run and resume it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from art_clat.training.averaging import Average
from art_clat.training.history import EpochRecord, History
from art_clat.utils.descriptions import check_description, fingerprint
from art_clat.utils.files import prepare, read, write
from art_clat.utils.weights import load_weights, named_tensors, weights

#: Version of what ``last.safetensors`` holds besides the weights; a run of another one cannot be resumed.
LAYOUT = 2


class Holder(Protocol):
    """What holds tensors that a checkpoint saves; their names are the network's, or there are none."""

    def state(self) -> dict[str, torch.Tensor]: ...

    def load(self, state: Mapping[str, torch.Tensor]) -> None: ...


@dataclass
class Progress:
    """
    Where a run is, besides its weights.

    :param seed: All random numbers follow from it, together with the epoch and the batch.
    :param epoch: The epoch in progress, from 0.
    :param batch: Its next batch, from 0.
    :param sums: Sums over the samples of the epoch so far, by name.
    :param seconds: Seconds of training in the epoch so far.
    :param chosen: Names of the layers that are trained; `None` for the whole network.
    :param attack_steps: Steps of the inner attack of an objective that is watched for catastrophic overfitting.
    :param best_checked: The highest accuracy under PGD that was measured while watching, in [0, 1].
    :param history: The record so far.
    """

    seed: int
    epoch: int = 0
    batch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    chosen: list[str] | None = None
    attack_steps: int = 1
    best_checked: float = 0.0
    history: History = field(default_factory=History)

    def begin_epoch(self, epoch: int) -> None:
        """Go to the first batch of an epoch."""
        self.epoch, self.batch, self.sums, self.seconds = epoch, 0, {}, 0.0


@dataclass(frozen=True)
class Best:
    """
    The weights of the epoch with the highest robust accuracy on the validation data.

    :param epoch: The epoch, from 0.
    :param robust_accuracy: In [0, 1].
    :param weights: Parameters and buffers by name, on the CPU.
    """

    epoch: int
    robust_accuracy: float
    weights: dict[str, torch.Tensor]


class Checkpoint:
    """
    The folder of a run's files: ``last.safetensors`` and, with validation data, ``best.safetensors``.

    Both hold the network's parameters and buffers under their names, so
    ``model.load_state_dict(safetensors.torch.load_file(path), strict=False)`` reads them. The last one also holds what
    is needed to resume the run. A file is written under another name, flushed to the disk and then renamed.

    :param folder: Created if missing.
    :param model: The network.
    :param optimizer: The network's optimiser.
    :param scheduler: The scheduler, or `None`.
    :param description: What must be equal for a run to be resumed; names, and values that JSON can hold.
    :param average: The average of the weights, or `None`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        description: Mapping[str, object],
        average: Average | None = None,
    ) -> None:
        self._average = average
        #: Holds the last good weights while it watches for catastrophic overfitting; `None` if nothing does.
        self.guard: Holder | None = None
        self.last, self.best = Path(folder) / "last.safetensors", Path(folder) / "best.safetensors"
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._description = json.loads(json.dumps(description))

    def prepare(self) -> None:
        """
        Check that the folder can be written to, and delete what a killed process left there.

        :raises OSError: If the folder cannot be written to.
        """
        prepare(self.last.parent)

    @property
    def identity(self) -> str:
        """What names the run in other files of the folder."""
        return hashlib.sha256(json.dumps(self._description, sort_keys=True).encode()).hexdigest()[:32]

    def resume(self) -> Progress | None:
        """
        Load the last checkpoint into network, average, optimiser and scheduler.

        :return: Where the run is; `None` if there is no checkpoint.
        :raises ValueError: If the file is damaged, of a newer format, or of another run. Nothing is changed then.
        """
        if not self.last.exists():
            return None
        tensors, content = read(self.last)
        if isinstance(content, dict) and "progress" in content and content.get("layout") != LAYOUT:
            raise ValueError(
                f"`checkpoint`: {self.last} was written by another version of art_clat and cannot be resumed. Use "
                "another folder; `model.load_state_dict(safetensors.torch.load_file(path), strict=False)` reads the "
                "weights."
            )
        try:
            check_description(content["description"], self._description, self.last.parent)
            optimizer, scheduler = (_unpacked(content[name], tensors) for name in ("optimizer", "scheduler"))
            record = History.from_json(json.dumps(content["progress"]["history"]))
            progress = Progress(**{**content["progress"], "history": record})
            averages, good = (
                {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
                for prefix in ("average:", "good:")
            )
            names = {name for name in tensors if not name.startswith(("optimizer:", "average:", "good:"))}
            expected = named_tensors(self._model).keys()
            if names != expected or (self._average is not None and averages.keys() != expected):
                raise KeyError("weights")
            if self.guard is not None and good:
                self.guard.load(good)
        except (KeyError, TypeError, AttributeError) as error:  # the checksum is right, but the content is not a run's
            raise ValueError(f"`checkpoint`: {self.last} does not hold a run: {error!r}.") from error
        load_weights(self._model, tensors)
        if self._average is not None:
            self._average.load(averages)
        self._optimizer.load_state_dict(cast(dict[str, Any], optimizer))
        if self._scheduler is not None:
            self._scheduler.load_state_dict(cast(dict[str, Any], scheduler))
        return progress

    def save(self, progress: Progress) -> None:
        """
        Save the run.

        :param progress: Where the run is.
        :raises OSError: If the folder cannot be written to.
        :raises TypeError: If the optimiser's or the scheduler's state holds something that only pickle could save.
        """
        tensors = weights(self._model)
        if self._average is not None:
            tensors |= {f"average:{name}": tensor for name, tensor in self._average.state().items()}
        if self.guard is not None:
            tensors |= {f"good:{name}": tensor for name, tensor in self.guard.state().items()}
        content = {
            "layout": LAYOUT,
            "description": self._description,
            "optimizer": _packed(self._optimizer.state_dict(), tensors, "optimizer:optimizer"),
            "scheduler": None
            if self._scheduler is None
            else _packed(self._scheduler.state_dict(), tensors, "optimizer:scheduler"),
            "progress": {**asdict(progress), "history": json.loads(progress.history.to_json())},
        }
        write(self.last, tensors, content)

    def save_best(self, best: Best) -> None:
        """
        Save the best weights.

        :param best: The weights and their epoch.
        :raises OSError: If the folder cannot be written to.
        """
        content = {"description": self._description, "epoch": best.epoch, "robust_accuracy": best.robust_accuracy}
        write(self.best, best.weights, content)

    def load_best(self) -> Best | None:
        """
        Read the best weights.

        :return: The weights and their epoch; `None` if there is no such file.
        :raises ValueError: As :meth:`resume`.
        """
        if not self.best.exists():
            return None
        tensors, content = read(self.best)
        try:
            check_description(content["description"], self._description, self.last.parent)
            if tensors.keys() != named_tensors(self._model).keys():
                raise KeyError("weights")
            return Best(content["epoch"], content["robust_accuracy"], tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`checkpoint`: {self.best} does not hold the best epoch of a run: {error!r}.") from error


class Keeper:
    """
    Saves a run while it trains, and keeps the weights of its best epoch.

    :param model: The network.
    :param checkpoint: Where to save; `None` to save nothing.
    :param average: The average of the weights, or `None`.
    :param every: Number of batches within an epoch after which to save.
    :param keeps_best: Whether to keep the best epoch's weights.
    :param writes: Whether this process writes files; only the first of several does.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint | None = None,
        *,
        average: Average | None = None,
        every: int = 0,
        keeps_best: bool = False,
        writes: bool = True,
    ) -> None:
        self._model = model
        #: The average of the weights, or `None`.
        self.average = average
        self._checkpoint = checkpoint
        self._every = every
        self._keeps_best = keeps_best
        #: Whether this process writes files.
        self.writes = writes
        self._best: Best | None = None

    def resume(self) -> Progress | None:
        """
        Load the run in the checkpoint, if there is one.

        :return: Where the run is; `None` if it is a new one.
        :raises ValueError: As :meth:`Checkpoint.resume`.
        """
        if self._checkpoint is None:
            return None
        best = self._checkpoint.load_best()
        progress = self._checkpoint.resume()
        if progress is not None:
            self._best = best
        return progress

    def hold(self, guard: Holder) -> None:
        """Save and resume the weights that a guard holds, too; call it before :meth:`resume`."""
        if self._checkpoint is not None:
            self._checkpoint.guard = guard

    @contextmanager
    def held(self) -> Iterator[None]:
        """
        Keep other runs out of the checkpoint's folder in this context. A killed process holds it no longer.

        :raises ValueError: If another run writes to it.
        :raises OSError: As :meth:`Checkpoint.prepare`.
        """
        if self._checkpoint is None or not self.writes:
            yield
            return
        self._checkpoint.prepare()
        folder = self._checkpoint.last.parent
        lock = FileLock(folder / "run.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(
                f"`checkpoint`: another run is writing to {folder}. Wait for its end, or use another folder."
            ) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder; `None` if nothing is saved."""
        return None if self._checkpoint is None else self._checkpoint.last.parent

    @property
    def identity(self) -> str:
        """What names the run in other files of the checkpoint's folder; empty if nothing is saved."""
        return "" if self._checkpoint is None else self._checkpoint.identity

    def is_due(self, batch: int) -> bool:
        """
        Return whether to save within an epoch.

        :param batch: Number of batches trained in the epoch.
        """
        return self._checkpoint is not None and batch % self._every == 0

    def save(self, progress: Progress) -> None:
        """
        Save the run, if this process writes.

        :param progress: Where the run is.
        """
        if self._checkpoint is not None and self.writes:
            self._checkpoint.save(progress)

    def consider(self, record: EpochRecord) -> None:
        """
        Keep the current weights if the epoch is the best so far.

        :param record: The epoch's record, with its validation accuracies.
        """
        robust = record.robust_accuracy
        if not self._keeps_best or robust is None or (self._best is not None and robust <= self._best.robust_accuracy):
            return
        self._best = Best(record.epoch, robust, weights(self._model))
        if self._checkpoint is not None and self.writes:
            self._checkpoint.save_best(self._best)

    def restore_best(self) -> None:
        """Load the best epoch's weights into the network."""
        if self._best is not None:
            load_weights(self._model, self._best.weights)


def fingerprint_of_state(optimizer: torch.optim.Optimizer) -> str:
    """Return 16 hexadecimal digits that differ for different optimiser states, such as the momentum."""
    tensors: dict[str, torch.Tensor] = {}
    packed = _packed(optimizer.state_dict()["state"], tensors, "state")
    return hashlib.sha256(f"{packed}{fingerprint(*tensors.values())}".encode()).hexdigest()[:16]


def _packed(value: object, tensors: dict[str, torch.Tensor], name: str) -> object:
    """Turn the state of an optimiser or scheduler into JSON; its tensors go into `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_packed(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):  # JSON turns numeric keys into text; MultiStepLR has a Counter
        return {
            "counter" if isinstance(value, Counter) else "items": [
                [_packed(key, tensors, f"{name}.key"), _packed(item, tensors, f"{name}.{key}")]
                for key, item in value.items()
            ]
        }
    raise TypeError(
        f"`checkpoint`: {name.removeprefix('optimizer:')} is a {type(value).__qualname__}, which cannot be saved "
        "without pickle; numbers, texts, tensors, and lists and dictionaries of them can."
    )


def _unpacked(value: object, tensors: Mapping[str, torch.Tensor]) -> object:
    """Turn what :func:`_packed` made back into a state."""
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_unpacked(item, tensors) for item in value["tuple"])
    items = value["counter"] if "counter" in value else value["items"]
    unpacked = {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in items}
    return Counter(unpacked) if "counter" in value else unpacked
