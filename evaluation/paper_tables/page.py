"""``results.md``: the tables and plots of a study, and how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from paper_tables.configuration import Settings, Study
from paper_tables.evidence import Evidence
from paper_tables.files import Record, write_text
from paper_tables.networks import make_model
from paper_tables.plots import plot_best_against_last, plot_trained_share
from paper_tables.results import Job, RefusedError, Results
from paper_tables.statistics import ShareGroups, share_correlation, trained_share
from paper_tables.tables import accuracy_table, difference_table, second_stage_table, stability_table, tuning_table


def aggregate(results: Results) -> str:
    """Write ``results.md`` and the plots of a study from its committed files; returns the text."""
    study = results.study
    evidence = Evidence.read(results, study.table_arms, study.seeds)
    if not len(evidence.runs):
        raise RefusedError(f"There is no result in {results.folder}: `run` makes them.")
    begun = tables_begun(study, evidence)
    sections = [
        *introduction(study, evidence),
        *(section for letter in begun for section in table_sections(results, letter, evidence)),
    ]
    if missing := [letter for letter in study.tables if letter not in begun]:
        sections.append(f"Not run yet: table {', '.join(missing)}.")
    sections += [
        *stability_sections(results),
        *second_stage_sections(study, evidence),
        *tuning_sections(results),
        *warning_sections(evidence),
        *failure_sections(evidence),
    ]
    for letter in begun if "best_autoattack" in evidence.runs else ():
        file = f"best-against-last-{letter}.png"
        plot_best_against_last(study, study.tables[letter]["arms"], evidence, results.folder / file)
        sections.append(f"![Best against last epoch, table {letter}]({file})")
    if groups := trained_share(study, evidence, study.table_arms, study.seeds):
        sections += share_sections(groups, results.folder / "trained-share.png")
    text = "\n\n".join(sections) + "\n"
    write_text(results.folder / "results.md", text)
    return text


def tables_begun(study: Study, evidence: Evidence) -> list[str]:
    """Return the tables with runs of their own; one that only repeats arms of those before it has not begun."""
    begun: list[str] = []
    shown: set[str] = set()
    for letter, table in study.tables.items():
        if any(evidence.has(arm) for arm in set(table["arms"]) - shown):
            begun.append(letter)
            shown |= set(table["arms"])
    return begun


def introduction(study: Study, evidence: Evidence) -> list[str]:
    """Write what was measured, and how."""
    preset, name, validated = study.preset, study.name, study.validated_images
    runs = evidence.runs
    dates, machines = sorted(set(runs["date"])), sorted(set(runs["machine"]))
    versions = [_versions(run) for run in runs.to_dict("records")]
    return [
        f"# Results of the preset `{name}`",
        training_text(preset),
        "Accuracies are in percent, on test images, after the last epoch unless stated otherwise: mean ± half the 95 % "
        f"interval (Student's t) over seeds. Every seed draws its own {preset['train_images']} training, "
        f"{preset['validation_images']} validation and {preset['test_images']} test images. PGD-20 runs on all test "
        f"images, AutoAttack (standard) on the first {preset['autoattack_images']}, *train PGD-20* on as many training "
        "images. The best epoch is the arm's epoch with the highest accuracy under the training attack on "
        f"{validated} validation images; the first stage's checkpoint is not a candidate. *trained* is the mean share "
        "of trained parameters over the selections. *s an epoch* includes the selections, and whatever else the "
        "machine did.",
        "Differences are paired by seed. p is that of the paired t-test, not corrected for the number of comparisons. "
        "Best epochs are compared with best epochs. *validation* is the last epoch's accuracy under the training "
        f"attack on {validated} validation images. It decides the package's defaults; test images do not.",
        f"Made with `python evaluation/paper_tables run --preset {name} --data DIR` and `python "
        f"evaluation/paper_tables aggregate --preset {name}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        f"{'; '.join(machines)}.",
        *(
            f"{text}: {', '.join(dict.fromkeys(runs['arm'][[version == text for version in versions]]))}."
            for text in dict.fromkeys(versions)
        ),
    ]


def training_text(preset: Settings) -> str:
    """Write how a preset trains."""
    first, more = preset["first_stage_epochs"], preset["epochs"]
    parameters = sum(parameter.numel() for parameter in make_model(preset, 0).parameters())
    return (
        f"{preset['data']}, timm's `{preset['backbone']}` with {parameters:,} parameters, augmentation: "
        f"{preset.get('augmentation', 'none')}. The first stage, PGD-AT except in table D, takes {first} epochs. Each "
        f"arm continues from its seed's first stage for {more} epochs. Batches of {preset['batch_size']}; SGD with "
        f"momentum 0.9 and weight decay 5e-4; learning rate {preset['lr']}, falling along a cosine over all "
        f"{first + more} epochs, times the arm's factor. Training attack: PGD, ℓ∞, ε = {255 * preset['eps']:.3g}/255, "
        f"{preset['attack_steps']} steps of {255 * preset['eps_step']:.3g}/255 from a random start. Layers are chosen "
        f"every {preset['reselect_every']} epochs, on {preset['selection_samples']} training images."
    )


def _versions(run: Record) -> str:
    """Write the versions of the packages that a run was made with."""
    versions = {**run["versions"], "art_clat": f"{run['versions']['art_clat']} at {run['commit']}"}
    return ", ".join(f"{key} {value}" for key, value in versions.items())


def table_sections(results: Results, letter: str, evidence: Evidence) -> list[str]:
    """Write a table, its differences, and both together with the seeds of the study that tuned."""
    study, seeds = results.study, results.study.seeds
    table = study.tables[letter]
    sections = [f"## {letter}. {table['title']}", *([table["note"]] if "note" in table else [])]
    sections += [accuracy_table(study, table, evidence, seeds), difference_table(study, table, evidence)]
    if results.tuner is results:
        return sections
    tuner = results.tuner.study
    earlier = Evidence.read(results.tuner, table["arms"], tuner.seeds)
    arms = [arm for arm in table["arms"] if earlier.has(arm) and evidence.has(arm)]
    together, of_both = (earlier + evidence).only(arms), {**table, "arms": arms}
    return [
        *sections,
        f"### Together with the seeds of `{tuner.name}`",
        "The arms with runs of both. An arm that was picked for its results on those seeds looks better here than it "
        "is.",
        accuracy_table(study, of_both, together, [*tuner.seeds, *seeds]),
        difference_table(study, of_both, together),
    ]


def stability_sections(results: Results) -> list[str]:
    """Write table E, if anything was measured for it."""
    records = [results.read_committed(Job("stability", seed)) for seed in results.study.seeds]
    measured = [record for record in records if record is not None and record["status"] == "done"]
    return ["## E. Stability of the index", stability_table(measured)] if measured else []


def second_stage_sections(study: Study, evidence: Evidence) -> list[str]:
    """Write what the second stage changed."""
    return [
        "## What the second stage changed",
        f"Means over the seeds. *validation*: the last epoch's accuracy under the training attack on "
        f"{study.validated_images} validation images. *second term*: that of the loss, before its weight (CLAT's "
        "feature distance, the divergence of TRADES and MART). *index*: the criticality index of the layers chosen at "
        "the first selection, measured then and at the last selection. *relative error*: that of the same layers' "
        "features under the attack, which does not depend on the scale of the weights.",
        second_stage_table(study, evidence, study.table_arms),
    ]


def tuning_sections(results: Results) -> list[str]:
    """Write what tuning chose, and how much that means."""
    study, tuner = results.study, results.tuner.study
    images = study.preset["validation_images"] * len(study.preset["tuning_seeds"])
    return [
        "## What tuning chose" + (f" in the preset `{tuner.name}`" if tuner is not study else ""),
        f"Chosen by the last epoch's PGD-20 accuracy on {images} validation images; of equal values, the first. `lr` "
        "is a factor on the schedule, `criticality_weight` is λ. At an accuracy of 20 % the standard error is "
        f"{100 * np.sqrt(0.2 * 0.8 / images):.1f} points; smaller differences between values mean nothing.",
        tuning_table(results, study.table_arms),
    ]


def warning_sections(evidence: Evidence) -> list[str]:
    """Write AutoAttack's warnings."""
    runs: list[dict[str, Any]] = evidence.runs[evidence.runs["status"] == "done"].to_dict("records")
    warnings = [
        f"- {run['arm']}, seed {run['seed']}, {when} epoch: {message}"
        for run in runs
        for when in ("last", "best")
        for message in run.get(f"{when}_warnings", ())
    ]
    return ["## AutoAttack's warnings", "\n".join(warnings) or "Nothing."]


def failure_sections(evidence: Evidence) -> list[str]:
    """Write which runs failed, and why."""
    failed: pd.DataFrame = evidence.runs[evidence.runs["status"] == "failed"]
    lines = [f"- {run['arm']}, seed {run['seed']}: {run['error']}" for run in failed.to_dict("records")]
    return ["## Failed", "\n".join(lines)] if lines else []


def share_sections(groups: ShareGroups, path: Path) -> list[str]:
    """Draw accuracy against the trained share, and write how they correlate."""
    plot_trained_share(groups, path)
    sections = [f"![Accuracy against the share of the parameters that is trained]({path.name})"]
    if correlation := share_correlation(groups):
        rho, factor, number = correlation
        sections.append(
            f"Test PGD-20 accuracy after the last epoch and the share of the parameters that is trained, over the "
            f"{number} arms with PGD-AT's own loss and the learning-rate factor {factor:g}: Spearman's ρ = {rho:.2f}."
        )
    return sections
