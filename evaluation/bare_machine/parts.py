"""The parts: the commands that each is made of, and how they are run within the minutes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bare_machine.cuda_tests import OUTCOMES, read_outcomes
from bare_machine.outputs import PartResult

ROOT = Path(__file__).parents[2]

PARTS = ("tests", "speed", "train")

#: Parts of the names of the contenders whose epochs are timed on a GPU.
TIMED_ON_A_GPU = ("ART Madry", "ART FBF", "PGD-AT", "CLAT adversarial, first half", "reused")

#: pytest's exit status if no test is left to run.
NO_TESTS = 5

#: Seconds between the polite request to end and the end.
PATIENCE = 5.0


@dataclass(frozen=True)
class Step:
    """
    One command of a part.

    :param name: What the result calls it.
    :param command: Program and arguments; the same command again does what is left.
    :param environment: What is added to the environment.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def steps_of(part: str, *, device: str, data: Path | None, folder: Path) -> list[Step]:
    """Return the commands of a part; `folder` is where it leaves its results."""
    python, on_gpu = sys.executable, device == "cuda"
    if part == "tests":
        chosen = ["-m", "cuda"] if on_gpu else ["-m", "not cuda", "-k", "freezing"]
        options = ["-p", "bare_machine.cuda_tests", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
        command = [python, "-m", "pytest", *options, *chosen, str(ROOT / "tests" / "test_devices.py")]
        return [Step("tests", command, {OUTCOMES: str(folder / "outcomes.jsonl")})]
    if part == "speed":
        form = ["--models", "ResNet-18", "--batches", "8", "--repeats", "3", "--only", *TIMED_ON_A_GPU]
        form = form if on_gpu else ["--preset", "smoke"]
        return [
            Step(
                precision,
                [
                    *(python, str(ROOT / "evaluation" / "speed"), "--device", device, "--precision", precision, *form),
                    *("--output", str(folder / f"speed-{device}-{precision}.md")),
                ],
            )
            for precision in (("float32", "bfloat16", "tf32") if on_gpu else ("float32",))
        ]
    arguments = ["--device", device, "--output", str(folder), "--unpacked", str(ROOT / "runs" / "data")]
    arguments += [] if data is None else ["--data", str(data)]
    return [Step("train", [python, "-m", "bare_machine.training", *arguments])]


def run_part(steps: Sequence[Step], result: PartResult, folder: Path, *, until: float) -> None:
    """
    Run the commands that have not passed yet, for as long as there is time, and note what came out.

    :param steps: The commands.
    :param result: Takes the outcomes.
    :param folder: Takes a log for each command.
    :param until: When to end, by ``time.monotonic()``.
    """
    result.is_finished = True
    for step in steps:
        if step.name in result.passed:
            continue
        log = folder / f"{step.name}.log"
        status = run_until(step, log, until=until)
        result.is_finished &= status is not None
        if OUTCOMES in step.environment:
            note_tests(result, Path(step.environment[OUTCOMES]))
            if status == NO_TESTS and result.passed:  # all have passed before
                continue
        elif status == 0:
            result.passed.append(step.name)
        if status not in (0, None) and not result.failed:
            result.failed[step.name] = f"exit status {status}\n{log.read_text(errors='replace')[-2000:]}".strip()
        result.write(folder)
        if status is None:
            return


def note_tests(result: PartResult, outcomes: Path) -> None:
    """Take over what the tests' plugin noted."""
    noted = read_outcomes(outcomes)
    result.passed = [name for name, (outcome, _) in noted.items() if outcome == "passed"]
    result.failed = {name: message for name, (outcome, message) in noted.items() if outcome == "failed"}
    result.skipped = {name: message for name, (outcome, message) in noted.items() if outcome == "skipped"}


def run_until(step: Step, log: Path, *, until: float) -> int | None:
    """
    Run a command, its output in a file.

    :param step: The command.
    :param log: Takes the output; what an earlier call wrote stays.
    :param until: When to end it, with all processes it has started.
    :return: Its exit status, or `None` if it was ended.
    """
    left = until - time.monotonic()
    if left <= PATIENCE:
        return None
    with log.open("a") as file:
        file.write(f"$ {json.dumps(list(step.command))}\n")
        file.flush()
        process = subprocess.Popen(
            step.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **step.environment, "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            return process.wait(left - PATIENCE)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_all(process)


def python_path() -> str:
    """Return where a command finds the code beside this file."""
    first = [str(ROOT), str(ROOT / "evaluation")]
    return os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "packages")])


def end_all(process: subprocess.Popen[bytes]) -> None:
    """End a process and those it has started, which may end their own in the meantime."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + PATIENCE / 2
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < until:
                process.poll()
                os.killpg(process.pid, 0)  # asks whether any is left
                time.sleep(0.05)
        except ProcessLookupError:
            return
