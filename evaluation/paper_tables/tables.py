"""The tables of ``results.md``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from paper_tables.configuration import Settings, Study
from paper_tables.evidence import Evidence
from paper_tables.markdown import markdown_table
from paper_tables.results import Results
from paper_tables.statistics import compare_rankings, interval, paired


def accuracy_table(study: Study, table: Settings, evidence: Evidence, seeds: Sequence[int]) -> str:
    """Write what a table's arms reached: mean and 95 % interval over the seeds."""
    columns = {
        "clean": "last_clean",
        "PGD-20": "last_pgd20",
        "AutoAttack": "last_autoattack",
        "best epoch: AutoAttack": "best_autoattack",
        "PGD-20 on AutoAttack's images": "last_pgd20_on_autoattack_images",
        "train PGD-20": "last_train_pgd20",
    }
    columns = _measured(columns, evidence)
    rows = []
    for arm in table["arms"]:
        runs, failed = evidence.done(arm), evidence.failed(arm)
        row = [study.title(arm), f"{len(runs)} of {len(seeds)}" + (f", **{failed} failed**" if failed else "")]
        if len(runs):
            row += [_percent(interval(runs[column])) for column in columns.values()]
            row += [f"{100 * np.mean(runs['trainable_share'].to_numpy()):.3g} %"]
            row += [f"{np.median(runs['seconds_per_epoch'].to_numpy()):.1f}"]
        rows.append(row)
    return markdown_table(["arm", "seeds", *columns, "trained", "s an epoch"], rows)


def difference_table(study: Study, table: Settings, evidence: Evidence) -> str:
    """Write how a table's arms differ, seed by seed, from the arms that they are compared with."""
    columns = {
        "AutoAttack": "last_autoattack",
        "PGD-20": "last_pgd20",
        "best epochs: AutoAttack": "best_autoattack",
        "best epochs: PGD-20": "best_pgd20",
        "clean": "last_clean",
        "validation": "validation",
    }
    columns = _measured(columns, evidence)
    compared = study.references(table)
    rows = []
    for other in dict.fromkeys(other for others in compared.values() for other in others):
        for arm in (arm for arm, others in compared.items() if other in others):
            runs, baseline = evidence.done(arm), evidence.done(other)
            common = [seed for seed in runs.index if seed in baseline.index]
            if common:
                row = [study.title(arm), study.title(other)]
                for column in columns.values():
                    row += _difference(paired(runs.loc[common, column], baseline.loc[common, column]))
                rows.append(row)
    titles = [title if title != "best epochs: PGD-20" else "PGD-20" for title in columns]
    return markdown_table(["arm", "against", *(cell for title in titles for cell in (title, "p"))], rows)


def _measured(columns: dict[str, str], evidence: Evidence) -> dict[str, str]:
    """Leave out the best epoch's columns if the preset does not evaluate it."""
    return {title: column for title, column in columns.items() if column in evidence.runs}


def _difference(mean_half_p: tuple[float, float, float]) -> list[str]:
    """Return the two cells of a paired difference, empty ones for what is not known."""
    mean, half, p = mean_half_p
    return ["" if np.isnan(mean) else _percent((mean, half), signed=True), "" if np.isnan(p) else f"{p:.3f}"]


def _percent(mean_and_half: tuple[float, float], *, signed: bool = False) -> str:
    """Write mean ± half the interval in percent."""
    mean, half = mean_and_half
    text = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    return text if np.isnan(half) else f"{text} ± {100 * half:.1f}"


def second_stage_table(study: Study, evidence: Evidence, arms: Sequence[str]) -> str:
    """Write what validation saw of every arm, and how second term and index changed."""
    header = ["arm", "validation", "second term: first epoch", "last epoch"]
    for figure in ("index of the layers chosen first", "their relative error"):
        header += [f"{figure}: then", "at the last selection"]
    rows = []
    for arm in arms:
        runs = evidence.done(arm)
        epochs = [evidence.of_run(evidence.epochs, arm, seed) for seed in runs.index]
        terms = [of_run["criticality_loss"].iloc[[0, -1]].to_numpy() for of_run in epochs if len(of_run)]
        if terms:
            means = np.mean(terms, axis=0)
            row = [study.title(arm), f"{100 * np.mean(runs['validation'].to_numpy()):.1f}"]
            row += [f"{mean:.3g}" for mean in means] if any(means) else ["", ""]
            rows.append(row + _figures_of_chosen(evidence, arm, runs.index))
    return markdown_table(header, rows)


def _figures_of_chosen(evidence: Evidence, arm: str, seeds: Sequence[int]) -> list[str]:
    """Return index and relative error of the layers chosen first, at the first and at the last selection."""
    then_and_last = []
    for seed in seeds:
        layers = evidence.of_run(evidence.layers, arm, seed)
        selections = sorted(set(layers["epoch"]))
        if len(selections) > 1:
            chosen = layers[(layers["epoch"] == selections[0]) & layers["chosen"].astype(bool)]["name"]
            of_chosen = layers[layers["name"].isin(chosen)].groupby("epoch")[["criticality", "relative_error"]].mean()
            then_and_last.append(of_chosen.iloc[[0, -1]].to_numpy())
    if not then_and_last:
        return []
    return [f"{mean:.3g}" for mean in np.mean(then_and_last, axis=0).T.ravel()]


def stability_table(measurements: Sequence[dict[str, Any]]) -> str:
    """Write how measurements of criticality agree: the layers' ranking, the head left out, and the first place."""
    every = [entry["measured"] for entry in measurements]
    reference = max((title for title in every[0] if title.startswith("PGD")), key=lambda title: int(title.split()[1]))
    pairs = {}
    if len(every) > 1:
        pairs[f"two seeds, {reference}"] = [(a[reference], b[reference]) for a, b in itertools.combinations(every, 2)]
    for title in every[0]:
        if title != reference:
            pairs[f"{title}, and {reference}, the same network"] = [(one[title], one[reference]) for one in every]
    rows = []
    for title, of_title in pairs.items():
        mean, least, largest, same = compare_rankings(of_title)
        rows.append([title, f"{mean:.2f} ({least:.2f} to {largest:.2f})", f"{100 * same:.0f} %"])
    return markdown_table(["compared with each other", "Spearman's ρ: mean (range)", "same first choice"], rows)


def tuning_table(results: Results, arms: Sequence[str]) -> str:
    """Write what tuning tried and chose."""
    study = results.study
    rows = []
    for owner in dict.fromkeys(study.arm(name)["tuned_by"] for name in arms):
        grid, tuned = study.grid(owner), results.tuned(owner)
        if not grid or tuned is None:
            continue
        scores = [np.mean(np.asarray(results.tuning_scores(owner, values), dtype=float)) for values in grid]
        tried = [
            f"{key} {', '.join(f'{value:g}' for value in values)}" for key, values in study.arms[owner]["tune"].items()
        ]
        least = "diverged" if np.isinf(min(scores)) else f"{100 * min(scores):.1f}"
        chosen = ", ".join(f"{key} {value:g}" for key, value in tuned.items())
        rows.append([study.title(owner), "; ".join(tried), f"{least} to {100 * max(scores):.1f}", chosen])
    return markdown_table(["arm", "tried", "validation PGD-20", "chosen"], rows)
