"""How much memory there is."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int | None:
    """Return how many bytes programs can still take, or `None` where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return int(found["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in found else None
