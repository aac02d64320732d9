"""A study's committed results as pandas tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from paper_tables.results import EPOCH_COLUMNS, LAYER_COLUMNS, Job, Results


@dataclass(frozen=True)
class Evidence:
    """
    What some arms and seeds have come to.

    :param runs: One row a run, the failed ones included, arm by arm; ``validation`` is the last epoch's accuracy under
           the training attack on validation images.
    :param epochs: One row an epoch of a run.
    :param layers: One row a layer of a selection of a run.
    """

    runs: pd.DataFrame
    epochs: pd.DataFrame
    layers: pd.DataFrame

    @classmethod
    def read(cls, results: Results, arms: Sequence[str], seeds: Sequence[int]) -> Evidence:
        """Read the committed results of some arms and seeds."""
        records = [results.read_committed(Job("runs", seed, arm)) for arm in arms for seed in seeds]
        epochs = _read_csv(results, "epochs", EPOCH_COLUMNS)
        layers = _read_csv(results, "layers", LAYER_COLUMNS)
        return cls.of(pd.DataFrame([record for record in records if record is not None]), epochs, layers)

    @classmethod
    def of(cls, runs: pd.DataFrame, epochs: pd.DataFrame, layers: pd.DataFrame) -> Evidence:
        """Put tables of runs, epochs and layers together."""
        if not len(runs):
            runs = pd.DataFrame(columns=["arm", "seed", "status"])
        last = epochs.groupby(["arm", "seed"], as_index=False)["robust_accuracy"].last()
        last = last.rename(columns={"robust_accuracy": "validation"})
        runs = runs.drop(columns="validation", errors="ignore")
        return cls(runs.merge(last, on=["arm", "seed"], how="left"), epochs, layers)

    def done(self, arm: str) -> pd.DataFrame:
        """Return an arm's runs that have not failed, by seed."""
        runs = self.runs[(self.runs["arm"] == arm) & (self.runs["status"] == "done")]
        return runs.set_index("seed", drop=False)

    def failed(self, arm: str) -> int:
        """Return the number of an arm's runs that failed."""
        return int(((self.runs["arm"] == arm) & (self.runs["status"] == "failed")).sum())

    def has(self, arm: str) -> bool:
        """Tell whether there is a run of an arm, failed or not."""
        return bool((self.runs["arm"] == arm).any())

    def only(self, arms: Sequence[str]) -> Evidence:
        """Return the evidence about some arms."""
        return Evidence(self.runs[self.runs["arm"].isin(arms)], self.epochs, self.layers)

    def of_run(self, table: pd.DataFrame, arm: str, seed: int) -> pd.DataFrame:
        """Return the rows of `epochs` or `layers` that belong to a run."""
        return table[(table["arm"] == arm) & (table["seed"] == seed)]

    def __add__(self, other: Evidence) -> Evidence:
        """Return this evidence and that of other seeds."""
        pairs = ((self.runs, other.runs), (self.epochs, other.epochs), (self.layers, other.layers))
        return Evidence(*(pd.concat(pair, ignore_index=True) for pair in pairs))


def _read_csv(results: Results, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """Read a compressed table of a study; an absent one has no rows."""
    path = results.folder / f"{name}.csv.gz"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(columns))
