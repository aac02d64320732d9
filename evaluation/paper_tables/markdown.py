"""The one way to write a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table; a row that is too short is filled with empty cells."""
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for row in rows:
        cells = [*row, *[""] * (len(header) - len(row))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
