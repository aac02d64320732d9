"""A run that is kept in memory from one call of ``fit`` to the next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from art_clat.training.checkpoint import Checkpoint


class Memory(Checkpoint):
    """
    What the files of a checkpoint would hold, kept in memory for the next call of ``fit``.

    :param kept: The files' tensors and content by name, and a temporary folder for what others save; changed.
    """

    def __init__(self, kept: dict[str, Any], *args: Any) -> None:
        if "folder" not in kept:
            kept["folder"] = TemporaryDirectory(prefix="art_clat-")
        super().__init__(kept["folder"].name, *args)
        self._kept = kept

    def _check(self, there: Mapping[str, object], folder: str = "", argument: str = "checkpoint") -> None:
        super()._check(there, "the latest call of this trainer", "resume")

    def _exists(self, path: Path) -> bool:
        return path.name in self._kept

    def _read(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors, content = self._kept[path.name]
        return dict(tensors), dict(content)

    def _write(self, path: Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, object]) -> None:
        self._kept[path.name] = tensors, content
