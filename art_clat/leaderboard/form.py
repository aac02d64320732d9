"""RobustBench's "New Model(s)" form, filled in."""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Mapping
from importlib import resources
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from art_clat.robustness.report import RobustnessReport
from art_clat.utils.formatting import format_eps

#: What stands where the form asks for something that nobody has said.
TODO = "TODO"


def fill_form(
    report: RobustnessReport,
    about: Mapping[str, Any],
    words: Mapping[str, str],
    *,
    additional_data: bool,
    checkpoint_url: str | None,
    code_url: str | None,
    license: str | None,
    definition: str,
    doubts: list[str],
    checks: list[str],
) -> str:
    """
    Fill in the form.

    :param report: The evaluation.
    :param about: What else ``report.json`` says, without local paths.
    :param words: Values of the form's fields ``model_id``, ``title``, ``authors``, ``link``, ``architecture``,
           ``definition``, ``architectures``, ``module`` and ``checkpoint``, the last four of them places in the folder.
    :param additional_data: Whether training used other data than the data set's.
    :param checkpoint_url: Where the checkpoint can be downloaded, or `None`.
    :param code_url: Where the code is, or `None`.
    :param license: ``"MIT"``, the address of another licence, or `None`.
    :param definition: Text of the network's definition.
    :param doubts: What keeps the result from being a claim to the leaderboard.
    :param checks: What was checked, and how it came out.
    :return: Markdown.
    """
    form = resources.files("art_clat.leaderboard").joinpath("new_model_form.md").read_text(encoding="utf-8")
    # RobustBench's own helper for normalisation is no architecture.
    uses_theirs = re.search(r"from robustbench\.model_zoo\.architectures\.(?!utils_architectures)", definition)
    is_mit = license == "MIT"
    is_custom = license is not None and not is_mit
    return string.Template(form).substitute(
        words,
        **_figures(report, about),
        warning=_warning(doubts),
        additional_data=str(additional_data).lower(),
        checkpoint_url=checkpoint_url or TODO,
        code_url=code_url or TODO,
        is_public=_tick(bool(checkpoint_url and code_url)),
        is_new_architecture=_tick(not uses_theirs),
        is_mit=_tick(is_mit),
        is_custom=_tick(is_custom),
        custom_license=license if is_custom else "" if is_mit else TODO,
        checks="\n".join(f"- {check}" for check in checks),
        needed="To load it"
        + (" (the definition needs the package art_clat):" if "from art_clat" in definition else ":"),
    )


def without_paths(about: Mapping[str, Any]) -> dict[str, Any]:
    """
    Cut local paths down to the names of files.

    :param about: What ``report.json`` says besides the figures.
    :return: The same; of models, checkpoints and the command's arguments only the last part of a path is left.
    """
    cleaned = dict(about)
    for key in ("model", "transfer_from"):
        if isinstance(cleaned.get(key), Mapping):
            cleaned[key] = {name: _file_name(value) for name, value in cleaned[key].items()}
    if isinstance(cleaned.get("command"), str):
        cleaned["command"] = shlex.join(_argument(word) for word in shlex.split(cleaned["command"]))
    return cleaned


def _argument(word: str) -> str:
    """Cut the path in an argument, which may be `--option=path`."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{_file_name(value)}"


def _file_name(value: Any) -> Any:
    """Return the last part of a path; anything else, ε as a quotient included, as it is."""
    if not isinstance(value, str) or re.fullmatch(r"[\d.]+/[\d.]+", value):
        return value
    return PurePosixPath(PureWindowsPath(value).as_posix()).name or value


def _figures(report: RobustnessReport, about: Mapping[str, Any]) -> dict[str, object]:
    return {
        "norm": report.norm,
        "eps": format_eps(report.eps, report.norm),
        "clean_accuracy": f"{report.clean_accuracy:.2%}",
        "robust_accuracy": f"{report.autoattack_accuracy:.2%}",
        "version": report.autoattack_version,
        "attacks": ", ".join(report.attacks),
        "nb_examples": report.nb_examples,
        "dataset": about["data"]["name"],
        "seed": report.seed,
        "batch_size": about.get("batch_size", TODO),
        "packages": ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items()) or TODO,
        "command": about.get("command", TODO),
    }


def _warning(doubts: list[str]) -> str:
    if not doubts:
        return ""
    items = "\n".join(f"> - {doubt}" for doubt in doubts)
    return f"> **Not a leaderboard claim as it stands:**\n>\n{items}\n\n"


def _tick(is_true: bool) -> str:
    return "x" if is_true else " "
