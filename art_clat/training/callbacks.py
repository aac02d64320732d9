"""What observes a run and may end it: the base class, and logs for TensorBoard and as CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from art.estimators.classification import PyTorchClassifier

from art_clat.training.history import EpochRecord, History
from art_clat.training.objectives import BatchLoss
from art_clat.utils.processes import Ranks

#: What a callback returns: ``"stop"`` ends the run.
Answer = Literal["stop"] | None


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """
    Where a run is when a callback is called.

    :param classifier: The classifier that is trained, with the weights of this moment.
    :param history: The record so far. Its last epoch is complete in ``on_epoch_end``, validation included, and its last
           selection in ``on_selection_end``.
    :param epoch: The epoch in progress, from 0; in ``on_run_end`` the number of complete epochs.
    :param batch: The batch in progress, from 0.
    :param nb_epochs: Number of epochs that the run was asked for.
    :param nb_batches: Number of batches in an epoch.
    :param loss: The batch's loss, in ``on_batch_end``; over the samples of this process. `None` elsewhere.
    :param is_resumed: Whether the run goes on from a checkpoint.
    :param rank: Number of this process, from 0. What writes a file does so in the first one alone.
    """

    classifier: PyTorchClassifier
    history: History
    epoch: int
    batch: int
    nb_epochs: int
    nb_batches: int
    loss: BatchLoss | None = None
    is_resumed: bool = False
    rank: int = 0

    @classmethod
    def of(cls, loop: Any, batch: int, loss: BatchLoss | None) -> RunEvent:
        """Return where a :class:`art_clat.TrainingLoop` is."""
        return cls(
            classifier=loop.estimator,
            history=loop.history,
            epoch=loop.progress.epoch,
            batch=batch,
            nb_epochs=loop.fit.nb_epochs,
            nb_batches=loop.batches.nb_batches,
            loss=loss,
            is_resumed=loop.is_resumed,
            rank=loop.ranks.rank,
        )


class Callback:
    """
    Observes a run of ``fit`` or ``fit_generator``. Override what you need.

    Every method gets a :class:`art_clat.RunEvent`. If it returns ``"stop"``, the run ends: after the batch in progress,
    or before the next one. It is then a run like any other: the history holds the complete epochs, an average or the
    best weights are put into the network, and the checkpoint is saved. A later ``fit`` with that checkpoint says so and
    trains no further, until it is given another `nb_epochs`.

    A callback may draw random numbers and use the classifier; that does not change the run. An exception ends ``fit``,
    and the model is restored as after any other. Of several processes each must have the same callbacks, and calls them
    at the same moments; all end the run if the callback of one says so. A run that goes on after a kill calls
    ``on_run_begin`` and ``on_epoch_begin`` again, and repeats what was not saved.
    """

    def on_run_begin(self, event: RunEvent) -> Answer:
        """Begin: after the checkpoint was read, before anything is trained."""
        return None

    def on_run_end(self, event: RunEvent) -> Answer:
        """End, unless an exception ended the run. The network has its final weights; the answer has no effect."""
        return None

    def on_epoch_begin(self, event: RunEvent) -> Answer:
        """Begin an epoch, or the rest of it; before a selection."""
        return None

    def on_epoch_end(self, event: RunEvent) -> Answer:
        """End an epoch, after its validation and before it is saved."""
        return None

    def on_batch_begin(self, event: RunEvent) -> Answer:
        """Begin a batch, which is trained in any case."""
        return None

    def on_batch_end(self, event: RunEvent) -> Answer:
        """End a batch, after the optimiser's step."""
        return None

    def on_selection_begin(self, event: RunEvent) -> Answer:
        """Begin a selection of layers, which is made in any case."""
        return None

    def on_selection_end(self, event: RunEvent) -> Answer:
        """End a selection of layers, before their first batch."""
        return None


class Callbacks:
    """
    The callbacks of a run.

    :param callbacks: What the user passed.
    :param ranks: The processes that train together.
    :param device: The device that this process computes on.
    :raises TypeError: If something among them is no callback.
    """

    def __init__(self, callbacks: Sequence[Any], ranks: Ranks, device: torch.device) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                name = callback.__name__ + ", a class" if isinstance(callback, type) else type(callback).__name__
                raise TypeError(f"`callbacks` must hold art_clat.Callback objects, got {name}.")
        self._callbacks: list[Callback] = list(callbacks)
        self._ranks, self._device = ranks, device

    def hear(self, moment: str) -> bool:
        """Return whether some callback has the method `moment`; it is the same in every process."""
        return bool(self._hearing(moment))

    def tell(self, moment: str, event: RunEvent) -> bool:
        """
        Call the method `moment` of all callbacks, and return whether one of them, in some process, ends the run.

        :raises TypeError: If one returns neither ``"stop"`` nor `None`.
        """
        stops = False
        for callback in self._hearing(moment):
            answer = getattr(callback, moment)(event)
            if not (answer is None or (isinstance(answer, str) and answer == "stop")):
                raise TypeError(
                    f"`callbacks`: {type(callback).__name__}.{moment} returned {answer!r}; it must return 'stop' to "
                    "end the run, or None."
                )
            stops |= answer == "stop"
        if self._ranks.size == 1:
            return stops
        return bool(self._ranks.sum(torch.tensor(float(stops), device=self._device)) > 0)

    def _hearing(self, moment: str) -> list[Callback]:
        silent = getattr(Callback, moment)
        return [c for c in self._callbacks if getattr(getattr(c, moment), "__func__", None) is not silent]


class CSVLog(Callback):
    """
    Writes the record of every epoch as a line of a CSV file: the fields of :class:`art_clat.EpochRecord`.

    The file always holds the whole record of the run, also after it was resumed. The log of an earlier run is replaced;
    another file is not.

    :param path: The file; its folder is created.
    """

    COLUMNS = tuple(field.name for field in fields(EpochRecord))

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def on_run_begin(self, event: RunEvent) -> Answer:
        """Write what a resumed run has recorded. A FileExistsError if the file is no such log."""
        if event.rank == 0:
            if self.path.exists() and not self.path.read_bytes().startswith(b"epoch,stage,"):
                raise FileExistsError(f"`CSVLog`: {self.path} is another kind of file. Choose another path.")
            self._write(event.history)
        return None

    def on_epoch_end(self, event: RunEvent) -> Answer:
        """Write the epoch's line."""
        if event.rank == 0:
            self._write(event.history)
        return None

    def on_run_end(self, event: RunEvent) -> Answer:
        """Write the last epoch again: a run that was stopped is validated after ``on_epoch_end``."""
        return self.on_epoch_end(event)

    def _write(self, history: History) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")  # a kill never leaves half a file
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.COLUMNS)
            writer.writerows([getattr(record, name) for name in self.COLUMNS] for record in history.epochs)
        beside.replace(self.path)


class TensorBoardLog(Callback):
    """
    Writes losses, accuracies, learning rate and the layers' scores for TensorBoard, by torch's ``SummaryWriter``.

    The step is the epoch. A resumed run continues the curves; what a killed one wrote of an epoch that is trained again
    is hidden by TensorBoard. A new run in the same folder hides the old one, so use a folder for each.

    :param log_dir: The folder of the event files; it is created.
    :raises ImportError: If the package tensorboard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("`TensorBoardLog` needs the package tensorboard: pip install tensorboard") from error
        self.log_dir = os.fspath(log_dir)
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def on_run_begin(self, event: RunEvent) -> Answer:
        """Open the file, and hide what was written of later epochs."""
        if event.rank == 0:
            self._writer = self._make(self.log_dir, purge_step=event.epoch)
            if event.history.selections and event.history.selections[-1].epoch == event.epoch:
                self.on_selection_end(event)  # hidden with its epoch, but not made again
        return None

    def on_selection_end(self, event: RunEvent) -> Answer:
        """Write the score of every layer, and which ones were chosen."""
        if event.rank == 0:
            record = event.history.selections[-1]
            for layer, score in zip(record.measured, record.scores, strict=False):
                self._writer.add_scalar(f"score/{layer.name}", score, record.epoch)
            self._writer.add_scalar("selection/trainable_parameters", record.trainable_parameters, record.epoch)
            self._writer.add_text("selection/chosen", ", ".join(record.chosen), record.epoch)
        return None

    def on_epoch_end(self, event: RunEvent) -> Answer:
        """Write the epoch's losses and accuracies."""
        if event.rank == 0:
            for name, value in _scalars(event.history.epochs[-1]):
                self._writer.add_scalar(name, value, event.epoch)
            self._writer.flush()
        return None

    def on_run_end(self, event: RunEvent) -> Answer:
        """Close the file."""
        if event.rank == 0:
            self._writer.close()
        return None


def _scalars(record: EpochRecord) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an epoch, by the names that group them in TensorBoard."""
    groups = {
        "loss": ("loss", "cross_entropy", "criticality_loss"),
        "accuracy": ("train_clean_accuracy", "train_robust_accuracy", "clean_accuracy", "robust_accuracy"),
        "time": ("learning_rate", "seconds"),
    }
    for group, names in groups.items():
        for name in names:
            if (value := getattr(record, name)) is not None:
                yield f"{group}/{name}", value
