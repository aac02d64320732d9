"""Save a run while it trains, and keep its best epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn

from art_clat.training.averaging import Average
from art_clat.training.checkpoint import Best, Checkpoint, Holder, Progress
from art_clat.training.history import EpochRecord
from art_clat.utils.weights import load_weights, weights


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
        folder = self.folder
        if self._checkpoint is None or folder is None or not self.writes:
            yield
            return
        self._checkpoint.prepare()
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
        """The folder for files of the run, a temporary one if it is kept in memory; `None` if nothing is saved."""
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
