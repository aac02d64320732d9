"""Files of results: written whole or not at all, counts exact, floats with six significant digits, equal bytes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a killed process leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(beside)
    beside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def rounded(value: Any) -> Any:
    """Round every float in a value to six significant digits; counts and texts stay as they are."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def read_lines(path: Path) -> list[Record]:
    """Read JSON lines; an absent file has none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """Write one line of JSON a record, floats rounded."""
    write_text(path, "".join(json.dumps(rounded(record), ensure_ascii=False) + "\n" for record in records))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a compressed CSV file as texts; an absent file has no rows."""
    if not path.exists():
        return []
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Record]) -> None:
    """Write a compressed CSV file, floats rounded, absent values empty; equal rows give equal bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rounded(row) for row in rows)

    def compress(beside: Path) -> None:
        with beside.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
            file.write(text.getvalue().encode())

    write_whole(path, compress)
