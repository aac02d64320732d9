"""What a part leaves: ``result.json``, and files that are small enough to bring back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Bytes of a file at most.
LIMIT = 16 * 2**20


@dataclass
class PartResult:
    """
    What came out of a part so far, over all its calls.

    :param part: ``"tests"``, ``"speed"`` or ``"train"``.
    :param device: Name of the GPU, or ``"CPU"``.
    :param environment: Machine, date and versions.
    :param seconds: What the part took.
    :param is_finished: Whether nothing is left.
    :param passed: Names of tests or steps.
    :param failed: What failed, and the end of its message.
    :param skipped: Tests that the machine cannot run, and why.
    """

    part: str
    device: str
    environment: dict[str, Any]
    seconds: float = 0.0
    is_finished: bool = False
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def resume(cls, folder: Path, part: str, device: str, environment: dict[str, Any]) -> PartResult:
        """
        Continue the result of an earlier call on such a device, whose failures are tried again, or begin one.

        :raises SystemExit: If the folder has results of another device.
        """
        path = folder / "result.json"
        if not path.exists():
            return cls(part, device, environment)
        before = cls(**json.loads(path.read_text()))
        if before.device != device:
            raise SystemExit(f"{path} has results of {before.device}, this is {device}: use another --output.")
        before.environment, before.failed = environment, {}
        return before

    def write(self, folder: Path) -> None:
        """Write ``result.json``."""
        (folder / "result.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    def summary(self) -> str:
        """Return one line, and one for each failure."""
        counts = f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.skipped)} skipped"
        end = "" if self.is_finished else "; something is left: run the same command again"
        failures = "".join(f"\n  failed: {name}: {message.splitlines()[-1]}" for name, message in self.failed.items())
        return f"{self.part} on {self.device}: {counts}, {self.seconds:.0f} s{end}{failures}"


def split_large_files(folder: Path, limit: int = LIMIT) -> None:
    """Replace every file above the limit by pieces; ``cat FILE.part-* > FILE`` makes it again."""
    for path in [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > limit]:
        with path.open("rb") as file:
            number = 0
            while piece := file.read(limit):
                path.with_name(f"{path.name}.part-{number:02}").write_bytes(piece)
                number += 1
        path.unlink()


def join_large_files(folder: Path) -> None:
    """Make the files again that :func:`split_large_files` has divided."""
    for first in list(folder.rglob("*.part-00")):
        whole = first.with_name(first.name.removesuffix(".part-00"))
        parts = sorted(first.parent.glob(f"{whole.name}.part-*"))
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        for part in parts:
            part.unlink()
