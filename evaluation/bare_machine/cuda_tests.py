"""A pytest plugin that notes every outcome at once, for a run that may be stopped at any instant."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

#: Environment variable that names the file of the outcomes, one JSON a line.
OUTCOMES = "GPU_TEST_OUTCOMES"


def read_outcomes(path: Path) -> dict[str, tuple[str, str]]:
    """Return the latest outcome of each test, and its message; a line that was cut short is passed over."""
    outcomes = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            name, outcome, message = json.loads(line)
        except ValueError:
            continue
        outcomes[name] = (outcome, message)
    return outcomes


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed before."""
    before = read_outcomes(Path(os.environ[OUTCOMES]))
    passed = [item for item in items if before.get(item.nodeid, ("",))[0] == "passed"]
    config.hook.pytest_deselected(items=passed)
    items[:] = [item for item in items if item not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note an outcome; a test whose end fails has failed."""
    if report.when == "call" or report.outcome != "passed":
        with open(os.environ[OUTCOMES], "a") as file:
            message = "" if report.passed else report.longreprtext[-2000:]
            file.write(json.dumps([report.nodeid, report.outcome, message]) + "\n")
