"""Who makes which run: every job is claimed by one process, skipped if it is done, and recorded if it crashes."""

from __future__ import annotations

import contextlib
import functools
import logging
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from art_clat.utils.environment import describe_environment
from paper_tables.experiment import Experiment
from paper_tables.files import Record
from paper_tables.results import Job, RefusedError, Results

log = logging.getLogger("paper_tables")

#: Seconds between two looks at jobs that other processes have.
PAUSE = 5


def run_all(
    experiment: Experiment, results: Results, arms: Sequence[str], seeds: Sequence[int], *, retry: bool = False
) -> None:
    """Do every job that is left, and wait for those that other processes are doing."""
    jobs = []
    if results.tuner is results:
        owners = dict.fromkeys(results.study.arm(name)["tuned_by"] for name in arms)
        jobs += [job for owner in owners for job in results.tuning_jobs(owner)]
    elif untuned := [name for name in arms if results.tuned(name) is None]:
        raise RefusedError(
            f"The preset {results.tuner.study.name} has not tuned yet: {', '.join(untuned)}. Run these there first."
        )
    jobs += [Job("runs", seed, name) for seed in seeds for name in arms]
    while jobs:
        waiting = [
            job
            for job in jobs
            if not results.is_done(job, retry=retry) and not attempt(experiment, results, job, retry=retry)
        ]
        if len(waiting) == len(jobs):
            time.sleep(PAUSE)
        jobs = waiting


def measure_all(experiment: Experiment, results: Results, seeds: Sequence[int]) -> None:
    """Measure criticality after the first stage of every seed that no other process is training."""
    for job in (Job("stability", seed) for seed in seeds):
        if not results.is_done(job) and not attempt(experiment, results, job, retry=False):
            log.warning("The first stage of seed %d is being trained; run this again afterwards.", job.seed)


def attempt(experiment: Experiment, results: Results, job: Job, *, retry: bool) -> bool:
    """Do a job; returns `False` if another process has it, or has yet to make what it needs."""
    base = results.study.arm(job.arm).get("base", "pgd_at") if job.arm else "pgd_at"
    try:
        if job.kind == "runs" and results.tuned(job.arm) is None:
            if errors := results.failed_tuning(job.arm):
                raise RuntimeError(f"its tuning failed, {errors[0]}")
            return False
        with claimed(results.work / f"first-{base}-seed{job.seed}.lock") as mine:
            if not mine:
                return False
            experiment.first_stage(job.seed, base)
        with claimed(results.work / f"{job.kind}-{job.stem}.lock") as mine:
            if not mine:
                return False
            if not results.is_done(job, retry=retry):
                start = time.perf_counter()
                results.write(job, {**_circumstances(results, job, experiment.device), **_do(experiment, results, job)})
                log.info("%s %s: %.0f s", job.kind, job.stem, time.perf_counter() - start)
    except RefusedError:
        raise
    except Exception as error:  # Recorded, and shown in every table that the arm belongs to.
        log.error("%s failed:\n%s", job.stem, "".join(traceback.format_exception(error)))
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        record = _circumstances(results, job, experiment.device)
        record.pop("tuned", None)
        results.write(job, {**record, **outcome})
    return True


def _do(experiment: Experiment, results: Results, job: Job) -> Record:
    """Make a job's run."""
    if job.kind == "tuning":
        return experiment.tune(job.arm, job.seed, job.values)
    if job.kind == "stability":
        return experiment.measure(job.seed)
    return experiment.run(job.arm, job.seed, results.tuned(job.arm) or {})


def _circumstances(results: Results, job: Job, device: str) -> Record:
    """Return what a record says besides what came out."""
    record: Record = {"arm": job.arm} if job.arm else {}
    record |= {"seed": job.seed, "setting": results.setting(job)}
    if job.kind == "runs":
        record["tuned"] = results.tuned(job.arm)
    elif job.kind == "tuning":
        record["values"] = job.values
    return {**record, "commit": _commit(), **describe_environment("cpu" if device == "cpu" else "cuda")}


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Claim a job unless another process has it; a killed process has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@functools.cache
def _commit() -> str | None:
    """Return the commit of the code, with a plus if it has been changed since; `None` if there is none."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=12"]
        return subprocess.run([*git, "--dirty=+"], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
