"""
The results of a study: one JSON file a finished job in the work folder, and the committed files made from them.

| committed file | content |
| --- | --- |
| ``preset.json`` | the preset, and what is equal in all lines of the files below (machine, versions, ...) |
| ``runs.jsonl`` | one line a run: what was reached, or why it failed; ``pandas.read_json(path, lines=True)`` |
| ``tuning.jsonl``, ``stability.jsonl`` | the same for tuning runs and for measurements of the first stages' layers |
| ``epochs.csv.gz``, ``layers.csv.gz`` | one row an epoch of a run, one row a layer of a selection of a run |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock

from paper_tables import files
from paper_tables.configuration import Settings, Study
from paper_tables.files import Record

#: The kinds of jobs: a job's file is ``<kind>/<stem>.json`` in the work folder, its line is in ``<kind>.jsonl``.
KINDS = ("runs", "tuning", "stability")

#: What a record says about how it was made; what is equal in all records is in ``preset.json`` instead.
CIRCUMSTANCES = ("commit", "date", "machine", "versions")

EPOCH_COLUMNS = (
    *("arm", "seed", "epoch", "stage", "loss", "cross_entropy", "criticality_loss", "learning_rate", "seconds"),
    *("train_clean_accuracy", "train_robust_accuracy", "clean_accuracy", "robust_accuracy"),
)

#: The last five belong to the selection and are the same for all of its layers.
LAYER_COLUMNS = (
    *("arm", "seed", "epoch", "name", "chosen", "weakness", "criticality", "relative_error", "relative_criticality"),
    *("nb_parameters", "shape", "is_head"),
    *("input_weakness", "nb_samples", "trainable_parameters", "total_parameters", "seconds"),
)


class RefusedError(ValueError):
    """A result that was made with another configuration."""


@dataclass(frozen=True)
class Job:
    """One run of an arm, one of its tuning runs, or one measurement of a first stage's layers."""

    kind: str
    seed: int
    arm: str = ""
    values: Settings = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """The name of the job's file."""
        values = [f"{key}{value:g}" for key, value in self.values.items()]
        return "-".join([*([self.arm] if self.arm else []), *values, f"seed{self.seed}"])

    @classmethod
    def of(cls, kind: str, record: Record) -> Job:
        """Return the job that a record is the result of."""
        return cls(kind, record["seed"], record.get("arm", ""), record.get("values", {}))


class Results:
    """Where a study's results are kept, and what its tuning chose."""

    def __init__(self, study: Study, *, results: Path, work: Path) -> None:
        self.study = study
        self.folder = results / study.name
        # The work of another configuration is not continued.
        self.work = work / f"{study.name}-{study.fingerprint({})}"
        self.tuner = self if study.tuned_in is None else Results(study.tuned_in, results=results, work=work)
        self._committed: dict[tuple[str, str], Record] | None = None

    def file(self, job: Job) -> Path:
        """Return where a job's result is kept until it is collected."""
        return self.work / job.kind / f"{job.stem}.json"

    def setting(self, job: Job) -> str:
        """Return the fingerprint of what a job depends on."""
        return self.study.setting(job.arm) if job.arm else self.study.fingerprint({})

    def write(self, job: Job, record: Record) -> None:
        """Keep a job's result."""
        files.write_json(self.file(job), record)

    def read(self, job: Job) -> Record | None:
        """Return a job's result, `None` if there is none; one of another configuration is refused."""
        path = self.file(job)
        if not path.exists():
            return self.read_committed(job)
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        self._check(job, record, path)
        return record

    def read_committed(self, job: Job) -> Record | None:
        """Return a job's result as the committed files have it, `None` if they do not."""
        if self._committed is None:
            self._committed = self._read_committed()
        record = self._committed.get((job.kind, job.stem))
        if record is not None:
            self._check(job, record, self.folder / f"{job.kind}.jsonl")
        return record

    def is_done(self, job: Job, *, retry: bool = False) -> bool:
        """Tell whether a job has a result; with `retry`, a failed job has none."""
        record = self.read(job)
        return record is not None and (record["status"] != "failed" or not retry)

    def _check(self, job: Job, record: Record, path: Path) -> None:
        """Refuse a result of another configuration, or of values that tuning no longer chooses."""
        if job.arm and job.arm not in self.study.arms:
            raise RefusedError(f"{path}: the configuration has no arm {job.arm!r}; move the result away.")
        if record["setting"] != self.setting(job):
            raise RefusedError(
                f"{path}, {job.stem} was made with another configuration: move it away, or restore paper_tables.toml."
            )
        if "tuned" in record and (tuned := self.tuned(job.arm)) not in (None, record["tuned"]):
            raise RefusedError(
                f"{path}, {job.stem} was made with {record['tuned']}, tuning now chooses {tuned}: move it away, or "
                "restore paper_tables.toml and the results of tuning."
            )

    # What tuning chose

    def tuning_jobs(self, owner: str) -> list[Job]:
        """Return an arm's tuning jobs: one for each combination of values and tuning seed."""
        return [job for values in self.study.grid(owner) for job in self._tuning_jobs(owner, values)]

    def _tuning_jobs(self, owner: str, values: Settings) -> list[Job]:
        return [Job("tuning", seed, owner, values) for seed in self.tuner.study.preset["tuning_seeds"]]

    def tuned(self, name: str) -> Settings | None:
        """Return the values that tuning chose for an arm, `None` while a tuning run is missing."""
        owner = self.study.arm(name)["tuned_by"]
        grid = self.study.grid(owner)
        scores = [self.tuning_scores(owner, values) for values in grid]
        if any(None in of_values for of_values in scores):
            return None
        means = [np.mean([score for score in of_values if score is not None]) for of_values in scores]
        return grid[int(np.argmax(means))] if grid else {}

    def tuning_scores(self, owner: str, values: Settings) -> list[float | None]:
        """Return the PGD-20 validation accuracy of every tuning seed: −∞ if it diverged, `None` if it is missing."""
        records = [self.tuner.read(job) for job in self._tuning_jobs(owner, values)]
        return [
            None
            if record is None or record["status"] == "failed"
            else -np.inf
            if "error" in record
            else record["pgd20"]
            for record in records
        ]

    def failed_tuning(self, name: str) -> list[str]:
        """Return the errors of the tuning runs of an arm that crashed."""
        jobs = self.tuning_jobs(self.study.arm(name)["tuned_by"])
        records = [self.tuner.read(job) for job in jobs]
        return [record["error"] for record in records if record is not None and record["status"] == "failed"]

    # The committed files

    def collect(self) -> None:
        """Add every finished job of the work folder to the committed files; the jobs' files stay."""
        found = [(kind, path) for kind in KINDS for path in sorted((self.work / kind).glob("*.json"))]
        if not found:
            return
        with FileLock(self.work / "collect.lock"):
            lines = self._read_committed()
            epochs, layers = (_by_run(files.read_rows(self.folder / f"{name}.csv.gz")) for name in ("epochs", "layers"))
            for kind, path in found:
                record = json.loads(path.read_text(encoding="utf-8"))
                job = Job.of(kind, record)
                self._check(job, record, path)
                history = record.pop("history", {"epochs": [], "selections": []})
                lines[kind, job.stem] = _flat(record)
                if kind == "runs":
                    epochs[job.arm, job.seed] = epoch_rows(job, history)
                    layers[job.arm, job.seed] = layer_rows(job, history)
            self._write_committed(lines)
            for name, columns, rows in (("epochs", EPOCH_COLUMNS, epochs), ("layers", LAYER_COLUMNS, layers)):
                in_order = (row for run in sorted(rows) for row in rows[run])
                files.write_rows(self.folder / f"{name}.csv.gz", columns, in_order)

    def _read_committed(self) -> dict[tuple[str, str], Record]:
        """Read the lines of the committed files."""
        path = self.folder / "preset.json"
        common = json.loads(path.read_text(encoding="utf-8"))["all_runs"] if path.exists() else {}
        return {
            (kind, Job.of(kind, line).stem): {**common, **line}
            for kind in KINDS
            for line in files.read_lines(self.folder / f"{kind}.jsonl")
        }

    def _write_committed(self, lines: dict[tuple[str, str], Record]) -> None:
        """Write the committed files except the histories."""
        records = list(lines.values())
        common = {
            key: records[0].get(key)
            for key in CIRCUMSTANCES
            if all(record.get(key) == records[0].get(key) for record in records)
        }
        content = {"name": self.study.name, "preset": self.study.preset, "all_runs": common}
        files.write_json(self.folder / "preset.json", content)
        first = ("arm", "seed", "status", "setting", "tuned", "values", *CIRCUMSTANCES)
        for kind in KINDS:
            of_kind = sorted((record for (of, _), record in lines.items() if of == kind), key=_place(kind))
            ordered = [{**{key: record[key] for key in first if key in record}, **record} for record in of_kind]
            own = [{key: value for key, value in record.items() if key not in common} for record in ordered]
            if own:
                files.write_lines(self.folder / f"{kind}.jsonl", own)
        self._committed = None


def _place(kind: str) -> Callable[[Record], tuple[str, list[float], int]]:
    """Return the order of a file's lines: by arm, values and seed."""
    return lambda record: (record.get("arm", ""), list(record.get("values", {}).values()), record["seed"])


def _flat(record: Record) -> Record:
    """Return a job's record with one column a figure: ``last_clean``, ``best_autoattack``, ..."""
    results = record.pop("results", {})
    return {**record, **{f"{when}_{key}": value for when in results for key, value in results[when].items()}}


def _by_run(rows: list[dict[str, str]]) -> dict[tuple[str, int], list[Record]]:
    """Return rows by arm and seed."""
    found: dict[tuple[str, int], list[Record]] = {}
    for row in rows:
        found.setdefault((row["arm"], int(row["seed"])), []).append(row)
    return found


def epoch_rows(job: Job, history: Record) -> list[Record]:
    """Return one row an epoch."""
    return [{"arm": job.arm, "seed": job.seed, **_pick(epoch, EPOCH_COLUMNS[2:])} for epoch in history["epochs"]]


def layer_rows(job: Job, history: Record) -> list[Record]:
    """Return one row a layer of a selection."""
    of_layer = ("name", "weakness", "criticality", "relative_error", "relative_criticality", "nb_parameters", "is_head")
    return [
        {
            "arm": job.arm,
            "seed": job.seed,
            "chosen": layer["name"] in selection["chosen"],
            **_pick(layer, of_layer),
            "shape": "×".join(map(str, layer["shape"])),
            **_pick(selection["measured"], ("input_weakness", "nb_samples")),
            **_pick(selection, ("epoch", "trainable_parameters", "total_parameters", "seconds")),
        }
        for selection in history["selections"]
        for layer in selection["measured"]["layers"]
    ]


def _pick(record: Record, columns: Sequence[str]) -> Record:
    """Return some columns; each must be there, so that a renamed field of the history is noticed."""
    return {column: record[column] for column in columns}
