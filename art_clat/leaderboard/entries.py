"""RobustBench's entries and its leaderboard's rows."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from art_clat.robustness.report import RobustnessReport
from art_clat.utils.formatting import format_eps
from art_clat.utils.robustbench_import import robustbench_utils

#: The test examples and the ε that RobustBench's leaderboards ask for.
LEADERBOARDS: dict[str, dict[str, Any]] = {
    "cifar10": {"nb_examples": 10_000, "eps": {"Linf": 8 / 255, "L2": 0.5}},
    "cifar100": {"nb_examples": 10_000, "eps": {"Linf": 8 / 255}},
    "imagenet": {"nb_examples": 5_000, "eps": {"Linf": 4 / 255}},
}

#: The attacks of AutoAttack's standard version.
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


def write_robustbench_entry(
    report: RobustnessReport,
    *,
    model_id: str,
    dataset: str,
    directory: str | os.PathLike[str] = ".",
    link: str | None = None,
    name: str | None = None,
    authors: str | None = None,
    venue: str | None = None,
    architecture: str | None = None,
    additional_data: bool | None = None,
    footnote: str | None = None,
) -> Path:
    """
    Write ``model_info/<dataset>/<threat model>/<model id>.json`` through RobustBench's own ``update_json``.

    The entry's footnote says what keeps the result from being a claim to the leaderboard, see
    :func:`leaderboard_shortfalls`.

    :param report: What :func:`~art_clat.evaluate_robustness` returned, with AutoAttack, for ``Linf`` or ``L2``.
    :param model_id: RobustBench's key of the model, e.g. ``"Gopal2025Criticality_R18"``. The file gets this name.
    :param dataset: ``"cifar10"``, ``"cifar100"``, ``"imagenet"``, or any other plain name.
    :param directory: The folder of ``model_info``, which is created if missing.
    :param link: Link to the paper.
    :param name: Title of the paper.
    :param authors: Authors of the paper.
    :param venue: Where the paper was published.
    :param architecture: The network, as RobustBench writes it, e.g. ``"ResNet-18"``.
    :param additional_data: Whether other training data were used; `None` for what an existing entry says, or else no.
    :param footnote: What else readers should know. It replaces the footnote of an existing entry.
    :return: The file. An existing one is updated.
    :raises ValueError: If AutoAttack was not run, RobustBench has no such threat model, or a name cannot be a file's.
    :raises ImportError: If RobustBench is not installed.
    """
    _check_entry(report, model_id=model_id, dataset=dataset)
    utils = robustbench_utils()
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    known = {member.value for member in BenchmarkDataset}
    member = BenchmarkDataset(dataset) if dataset in known else SimpleNamespace(value=dataset)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with working_directory(folder):
        utils.update_json(
            member, ThreatModel(report.norm), model_id, report.clean_accuracy, report.autoattack_accuracy, report.eps
        )
    path = folder / "model_info" / dataset / report.norm / f"{model_id}.json"
    described = utils.ModelInfo(
        link=link,
        name=name,
        authors=authors,
        venue=venue,
        architecture=architecture,
        additional_data=additional_data,
        number_forward_passes=1,
        dataset=dataset,
        eps=format_eps(report.eps, report.norm),
    )
    entry = json.loads(path.read_text(encoding="utf-8"))
    entry.update({key: value for key, value in dataclasses.asdict(described).items() if value is not None})
    entry["additional_data"] = bool(entry["additional_data"])
    entry["footnote"] = _footnote(footnote, leaderboard_shortfalls(report, dataset))
    path.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    return path


def _check_entry(report: RobustnessReport, *, model_id: str, dataset: str) -> None:
    """Refuse a report that RobustBench has no entries for, and names that no file can have."""
    if report.autoattack_accuracy is None:
        raise ValueError("`report` has no AutoAttack result, which RobustBench's entries consist of.")
    if report.autoattack_version == "few-classes":
        raise ValueError(
            "`report`: its attacks are AutoAttack's parts for few classes, not AutoAttack, and RobustBench has no "
            "entries for that."
        )
    if report.norm not in ("Linf", "L2"):
        raise ValueError(f"`report`: RobustBench has entries for Linf and L2, got {report.norm}.")
    for argument, value in (("model_id", model_id), ("dataset", dataset)):
        if not value or Path(value).name != value or value.startswith("."):
            raise ValueError(f"`{argument}` must be a plain file name, got {value!r}.")


def _footnote(text: str | None, shortfalls: list[str]) -> str | None:
    """Write the footnote of an entry: the user's text, then what keeps the result from the leaderboard."""
    own = [text if text.endswith((".", "!", "?")) else f"{text}."] if text else []
    reservation = [f"Not a leaderboard result: {'; '.join(shortfalls)}."] if shortfalls else []
    return " ".join([*own, *reservation]) or None


def leaderboard_shortfalls(report: RobustnessReport, dataset: str) -> list[str]:
    """
    List what keeps a result from being a claim to RobustBench's leaderboard.

    :param report: What :func:`~art_clat.evaluate_robustness` returned, with AutoAttack.
    :param dataset: RobustBench's name of the data set, or any other.
    :return: A phrase for each reason: there is no such leaderboard, it asks for more examples or another ε, AutoAttack
            is not the standard version or lacks attacks, the evaluation warned. Empty for what can be a claim.
    """
    asked = LEADERBOARDS.get(dataset)
    if asked is None:
        return [f"RobustBench has no leaderboard for {dataset} ({report.nb_examples} examples)"]
    found = []
    if report.nb_examples < asked["nb_examples"]:
        found.append(
            f"evaluated on {report.nb_examples} of the {asked['nb_examples']} examples the leaderboard asks for"
        )
    eps = asked["eps"].get(report.norm)
    if eps is None:
        found.append(f"RobustBench has no {report.norm} leaderboard for {dataset}")
    elif not np.isclose(report.eps, eps, rtol=1e-6):
        here, there = (format_eps(value, report.norm) for value in (report.eps, eps))
        found.append(f"ε = {here} instead of {there}")
    if report.autoattack_version != "standard":
        found.append(f"AutoAttack's {report.autoattack_version} version instead of the standard one")
    elif skipped := [attack for attack in STANDARD if attack not in report.attacks]:
        found.append(f"without AutoAttack's {', '.join(skipped)}")
    return found + [f"the evaluation warned: {message}" for message in report.warnings]


def preprocessing_shortfalls(preprocessing: str | None, *, model_id: str, dataset: str, norm: str) -> list[str]:
    """
    Find out whether RobustBench would evaluate a model on other images.

    :param preprocessing: RobustBench's name of how the images of the evaluation were resized and cropped.
    :param model_id: RobustBench's key of the model, whose definition must have been loaded.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :return: A phrase that says how the images differ, as in :func:`leaderboard_shortfalls`; empty if they do not.
    :raises ImportError: If RobustBench is not installed.
    """
    robustbench_utils()
    from robustbench.data import PREPROCESSINGS, get_preprocessing
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    if dataset != "imagenet":
        return []
    try:
        theirs = repr(get_preprocessing(BenchmarkDataset(dataset), ThreatModel(norm), model_id, None))
    except (AttributeError, KeyError):  # the network has no `default_cfg`, or an incomplete one
        theirs = "nothing: it finds no `default_cfg`"
    here = repr(PREPROCESSINGS[preprocessing])
    if here == theirs:
        return []
    here, theirs = (" ".join(text.split()) for text in (here, theirs))
    return [f"evaluated on images made by {here}; RobustBench's `benchmark` derives {theirs}"]


def leaderboard_row(model_id: str, *, dataset: str, norm: str, directory: str | os.PathLike[str]) -> str:
    """
    Write a model's row of RobustBench's table in Markdown, with RobustBench's own ``list_available_models``.

    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :param directory: Where :func:`write_robustbench_entry` wrote ``model_info``.
    :return: The table's head and the row. The rank counts those models of RobustBench's zoo that have an entry in
            `directory`.
    :raises ImportError: If RobustBench is not installed.
    """
    utils = robustbench_utils()
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    zoo = utils.all_models[BenchmarkDataset(dataset)][ThreatModel(norm)]
    printed = io.StringIO()
    added = model_id not in zoo
    if added:
        zoo[model_id] = {}
    try:
        with working_directory(Path(directory)), contextlib.redirect_stdout(printed):
            utils.list_available_models(dataset, norm)
    finally:
        if added:
            del zoo[model_id]
    head, rule, *rows = printed.getvalue().splitlines()
    return "\n".join([head, rule, *(row for row in rows if f"**{model_id}**" in row)]) + "\n"


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """
    Change the working directory for a while. RobustBench reads and writes below it.

    :param path: The folder.
    """
    before = Path.cwd()
    try:
        os.chdir(path)
        yield
    finally:
        os.chdir(before)
