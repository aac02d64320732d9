"""Save a run and resume it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import torch
from torch import nn

from art_clat.layers.layer import Layer
from art_clat.training.averaging import Average
from art_clat.training.history import History
from art_clat.training.schedule import Schedule
from art_clat.training.state import pack, unpack
from art_clat.utils.descriptions import check_description
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
    :param stopped: Whether a callback ended the run.
    :param planned: Number of epochs that it was asked for when it was saved; `None` if it was not.
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
    stopped: bool = False
    planned: int | None = None

    def chosen_of(self, layers: Sequence[Layer]) -> list[Layer] | None:
        """Return the layers that are trained; `None` for the whole network."""
        return None if self.chosen is None else [layer for layer in layers if layer.name in self.chosen]

    def begin_epoch(self, epoch: int) -> None:
        """Go to the first batch of an epoch."""
        self.epoch, self.batch, self.sums, self.seconds = epoch, 0, {}, 0.0

    def go_on(self, nb_epochs: int) -> tuple[str, int]:
        """Go on with a saved run until it has `nb_epochs`; return what the log says of it, and at which level."""
        self.history.configuration.get("fit", {})["nb_epochs"] = nb_epochs
        self.stopped = self.stopped and nb_epochs == self.planned
        if self.stopped:
            way = f"another `nb_epochs` than {nb_epochs} goes on"
            return f"was stopped by a callback in epoch {self.epoch} ({way})", logging.WARNING
        return "is finished" if self.epoch >= nb_epochs else f"resumes at epoch {self.epoch}", logging.INFO


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
    :param schedule: What steps the learning rate.
    :param description: What must be equal for a run to be resumed; names, and values that JSON can hold.
    :param average: The average of the weights, or `None`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        description: Mapping[str, object],
        average: Average | None = None,
    ) -> None:
        self._average = average
        #: Holds the last good weights while it watches for catastrophic overfitting; `None` if nothing does.
        self.guard: Holder | None = None
        self.last, self.best = Path(folder) / "last.safetensors", Path(folder) / "best.safetensors"
        self._model = model
        self._optimizer = optimizer
        self._schedule = schedule
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
        same = {name: fact for name, fact in self._description.items() if name != "nb_epochs"}  # which may grow
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:32]

    def resume(self) -> Progress | None:
        """
        Load the last checkpoint into network, average, optimiser and scheduler.

        :return: Where the run is; `None` if there is no checkpoint.
        :raises ValueError: If the file is damaged, of a newer format, or of another run. Nothing is changed then.
        """
        if not self._exists(self.last):
            return None
        tensors, content = self._read(self.last)
        if isinstance(content, dict) and "progress" in content and content.get("layout") != LAYOUT:
            raise ValueError(
                f"`checkpoint`: {self.last} was written by another version of art_clat and cannot be resumed. Use "
                "another folder; `model.load_state_dict(safetensors.torch.load_file(path), strict=False)` reads the "
                "weights."
            )
        try:
            self._check(content["description"])
            optimizer, scheduler = (unpack(content[name], tensors) for name in ("optimizer", "scheduler"))
            record = History.from_json(json.dumps(content["progress"]["history"]))
            planned = content["description"]["nb_epochs"]
            progress = Progress(**{**content["progress"], "history": record, "planned": planned})
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
        self._check_nb_epochs(progress, planned)
        load_weights(self._model, tensors)
        if self._average is not None:
            self._average.load(averages)
        self._optimizer.load_state_dict(cast(dict[str, Any], optimizer))
        self._schedule.load_state_dict(cast("dict[str, Any] | None", scheduler))
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
            "optimizer": pack(self._optimizer.state_dict(), tensors, "optimizer:optimizer"),
            "scheduler": pack(self._schedule.state_dict(), tensors, "optimizer:scheduler"),
            "progress": {**asdict(progress), "history": json.loads(progress.history.to_json())},
        }
        self._write(self.last, tensors, content)

    def save_best(self, best: Best) -> None:
        """
        Save the best weights.

        :param best: The weights and their epoch.
        :raises OSError: If the folder cannot be written to.
        """
        content = {"description": self._description, "epoch": best.epoch, "robust_accuracy": best.robust_accuracy}
        self._write(self.best, best.weights, content)

    def load_best(self) -> Best | None:
        """
        Read the best weights.

        :return: The weights and their epoch; `None` if there is no such file.
        :raises ValueError: As :meth:`resume`.
        """
        if not self._exists(self.best):
            return None
        tensors, content = self._read(self.best)
        try:
            self._check(content["description"])
            if tensors.keys() != named_tensors(self._model).keys():
                raise KeyError("weights")
            return Best(content["epoch"], content["robust_accuracy"], tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`checkpoint`: {self.best} does not hold the best epoch of a run: {error!r}.") from error

    def _check(self, there: Mapping[str, object], folder: str = "", argument: str = "checkpoint") -> None:
        """Refuse the description of another run; a run may go on to another number of epochs."""
        nb_epochs = self._description["nb_epochs"]
        if there["nb_epochs"] != nb_epochs and there["the scheduler"] != self._description["the scheduler"]:
            raise ValueError(
                f"`nb_epochs` is {nb_epochs}, but the run that would go on was planned for {there['nb_epochs']}, and "
                "its epochs so far were trained with another `scheduler`. Pass the same scheduler if the run should go "
                "on, or begin a new run with the new one."
            )
        there = {**there, "nb_epochs": nb_epochs}
        check_description(there, self._description, folder or self.last.parent, argument=argument)

    def _check_nb_epochs(self, progress: Progress, planned: int) -> None:
        """Refuse fewer epochs than were trained, and more than the schedule was made for."""
        nb_epochs, begun = self._description["nb_epochs"], progress.epoch + (progress.batch > 0)
        if nb_epochs < min(begun, planned):
            raise ValueError(
                f"`nb_epochs` is {nb_epochs}, but the run that would go on has begun {begun} epochs. Pass at least "
                f"{begun}, or begin a new run."
            )
        if nb_epochs > planned:
            self._schedule.check_extended(planned)

    def _exists(self, path: Path) -> bool:
        return path.exists()

    def _read(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return read(path)

    def _write(self, path: Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, object]) -> None:
        write(path, tensors, content)


class Memory(Checkpoint):
    """
    What the files of a checkpoint would hold, kept in memory for the next call of ``fit``.

    :param kept: The files' tensors and content by name, and a temporary folder for what others save; changed.
    """

    def __init__(self, kept: dict[str, Any], *args: Any) -> None:
        if "folder" not in kept:
            kept["folder"] = TemporaryDirectory(prefix="art_clat-")
        super().__init__(kept["folder"].name, *args)
        self.kept = kept

    def _check(self, there: Mapping[str, object], folder: str = "", argument: str = "checkpoint") -> None:
        super()._check(there, "the latest call of this trainer", "resume")

    def _exists(self, path: Path) -> bool:
        return path.name in self.kept

    def _read(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors, content = self.kept[path.name]
        return {name: tensor.clone() for name, tensor in tensors.items()}, dict(content)

    def _write(self, path: Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, object]) -> None:
        self.kept[path.name] = tensors, content
