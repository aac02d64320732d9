"""One self-contained HTML page about runs: `art-clat report`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from art_clat.leaderboard.entries import leaderboard_shortfalls
from art_clat.report.figures import Figure, draw
from art_clat.report.words import NORMS, breakable, percent, text
from art_clat.robustness.report import RobustnessReport
from art_clat.training.history import EpochRecord, History
from art_clat.utils.files import read
from art_clat.utils.formatting import format_eps
from art_clat.utils.plots import new_axes

#: What the page says it was made by, and what a file must say to be written over.
GENERATOR = "art-clat report"

#: Of a figure, in inches: its text can be read on a telephone, whose window it fills.
WIDTH = 5.2


@dataclass(frozen=True)
class Row:
    """
    A row of the table. Accuracies are in [0, 1], or `None`.

    :param group: The threat model: data, norm, ε, AutoAttack's version and number of examples, rows of which can be
           compared.
    :param name: The run.
    :param clean: Clean accuracy.
    :param pgd: Accuracy under PGD.
    :param autoattack: Accuracy under AutoAttack.
    :param notes: What else readers should know.
    """

    group: str
    name: str
    clean: float
    pgd: float | None
    autoattack: float | None
    notes: tuple[str, ...]


@dataclass
class Page:
    """
    What the template shows.

    :param rows: Of the table.
    :param evaluations: Of each evaluation its name, waterfall, and the accuracy after each attack.
    :param trainings: Of each history its name, record, best and last epoch, and figures.
    :param facts: Of each run folder its name, and what was said about it: command, machine, versions and so on.
    """

    rows: list[Row] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    trainings: list[dict[str, Any]] = field(default_factory=list)
    facts: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def add(self, folder: Path) -> None:
        """
        Add a run.

        :param folder: The run's.
        :raises ValueError: If it is none, or what is in it cannot be read.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder. Give the folders of evaluations or trainings.")
        name = folder.resolve().name
        # The folder of a submission has the evaluation in a subfolder.
        evaluation = next((at for at in (folder, folder / "evaluation") if (at / "report.json").exists()), None)
        histories = _histories(folder)
        entries = sorted(folder.glob("model_info/*/*/*.json"))
        if evaluation is None and not histories and not entries:
            raise ValueError(
                f"{folder} is not the folder of a run: it has none of report.json, evaluation/report.json, "
                "a .json file of History.to_json, last.safetensors and model_info/*/*/*.json."
            )
        if evaluation is not None:
            self._add_evaluation(name, evaluation)
        for path in entries:
            self._add_entry(path)
        if (folder / "run.json").exists():
            self.facts.append((name, _json(folder / "run.json")))
        for path in histories:
            which = "" if path.suffix == ".safetensors" else path.stem.removesuffix("history").rstrip("-_")
            self._add_training(f"{name}/{which}".rstrip("/"), path)

    def groups(self) -> dict[str, list[Row]]:
        """
        Rank the rows.

        :return: Rows by threat model, the most robust first.
        """
        ranked = sorted(
            self.rows, key=lambda row: (_or_last(row.autoattack), _or_last(row.pgd), row.clean), reverse=True
        )
        groups: dict[str, list[Row]] = {row.group: [] for row in ranked}
        for row in ranked:
            groups[row.group].append(row)
        return groups

    def _add_evaluation(self, name: str, folder: Path) -> None:
        report, about = RobustnessReport.load(folder)
        data = about.get("data")
        dataset = str(data.get("name", "") if isinstance(data, dict) else data or f"data not named, {name}")
        restarts = f", {report.pgd_restarts} restarts" if report.pgd_restarts > 1 else ""
        notes = [f"PGD-{report.pgd_max_iter}{restarts}"]
        if report.transfer_accuracy is not None:
            notes.append(f"{percent(report.transfer_accuracy)} on adversarial examples of another network")
        notes += report.warnings
        if dataset in ("cifar10", "cifar100", "imagenet") and report.autoattack is not None:
            notes += leaderboard_shortfalls(report, dataset)
        threat = f"{dataset}, {NORMS[report.norm]}, ε = {format_eps(report.eps, report.norm)}"
        if report.autoattack_version not in (None, "standard"):
            threat += f", AutoAttack's {report.autoattack_version} version"
        self.rows.append(
            Row(
                f"{threat}, {report.nb_examples:,} examples (two standard errors: up to "
                f"{100 / math.sqrt(report.nb_examples):.1f} points)",
                name,
                report.clean_accuracy,
                report.pgd_accuracy,
                report.autoattack_accuracy,
                tuple(dict.fromkeys(notes)),
            )
        )
        left = [("clean", report.clean_accuracy), *report.to_dict()["attacks"].items()]
        words = ", ".join(f"{percent(accuracy)} after {attack}" for attack, accuracy in left[1:])
        waterfall = None
        if report.attacks:
            ax = new_axes(width=0.9 + 0.72 * (len(left) + 1), height=3.4)
            waterfall = draw(lambda: report.plot(ax), f"Waterfall: {percent(left[0][1])} clean, {words}.")
        self.evaluations.append({"name": name, "left": left, "waterfall": waterfall})
        self.facts.append((name, about))

    def _add_entry(self, path: Path) -> None:
        entry = _json(path)
        dataset, norm = path.parts[-3:-1]
        try:
            clean, robust = (float(entry[key]) / 100 for key in ("clean_acc", "autoattack_acc"))
            threat = f"{dataset}, {NORMS.get(norm, norm)}, ε = {entry['eps']}, RobustBench entries"
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a RobustBench entry with AutoAttack's accuracy: {error!r}.") from error
        notes = tuple(str(entry[key]).rstrip(".") for key in ("name", "architecture", "footnote") if entry.get(key))
        self.rows.append(Row(threat, path.stem, clean, None, robust, notes))

    def _add_training(self, name: str, path: Path) -> None:
        history, configuration = _read_history(path)
        best = next((record for record in history.epochs if record.epoch == history.best_epoch), None)
        self.trainings.append(
            {
                "name": name,
                "history": history,
                "configuration": configuration,
                "best": best,
                "last": history.epochs[-1],
                "curves": _curves(history, best),
                "heat_map": _heat_map(history),
            }
        )

    def comparison(self) -> Figure | None:
        """
        Draw the robust accuracy of all trainings together.

        :return: `None` for fewer than two with validation data.
        """
        curves = {
            training["name"]: [(record.epoch, record.robust_accuracy) for record in training["history"].epochs]
            for training in self.trainings
            if training["best"] is not None
        }
        if len(curves) < 2:
            return None

        def lines() -> Axes:
            ax = new_axes(width=WIDTH, height=3.6)
            for name, points in curves.items():
                epochs, values = zip(*points, strict=True)
                ax.plot(epochs, [math.nan if v is None else 100 * v for v in values], label=name, linewidth=2)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_xlabel("epoch")
            ax.set_ylabel("robust accuracy, validation [%]")
            ax.legend(fontsize=8)
            return ax

        return draw(lines, f"Robust accuracy on the validation data over the epochs of {', '.join(curves)}.")

    def html(self) -> str:
        """
        Write the page.

        :return: HTML.
        """
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters |= {"percent": percent, "text": text, "breakable": breakable}
        template = resources.files("art_clat.report").joinpath("page.html.j2").read_text(encoding="utf-8")
        return environment.from_string(template).render(page=self, generator=GENERATOR)


def _histories(folder: Path) -> list[Path]:
    """Find a folder's histories: any JSON with epochs and selections; without them the trainer's checkpoint."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name == "history.json" or path.name.endswith("-history.json"):
            found.append(path)  # whatever it holds, so that a damaged one is not passed over
        elif path.name not in ("report.json", "run.json"):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:  # something else of the user's
                continue
            if isinstance(content, dict) and {"epochs", "selections"} <= content.keys():
                found.append(path)
    return found or sorted(folder.glob("last.safetensors"))


def _read_history(path: Path) -> tuple[History, dict[str, Any]]:
    """Read a history of at least one epoch, and what the run was made with, which older files do not say."""
    try:
        if path.suffix == ".safetensors":
            content = read(path)[1]["progress"]["history"]
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
        history = History.from_json(json.dumps(content))
        history.epochs[-1]
        return history, history.configuration
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not the history of a training: {error!r}.") from error


def _curves(history: History, best: EpochRecord | None) -> Figure:
    """Draw accuracy over the epochs."""
    last = history.epochs[-1]
    words = "no validation data"
    if best is not None:
        words = f"robust accuracy is best, {percent(best.robust_accuracy)}, in epoch {best.epoch}"
        words += f" and {percent(last.robust_accuracy)} in the last, {last.epoch}"
    return draw(
        lambda: history.plot_curves(new_axes(width=WIDTH, height=3.6)),
        f"Accuracy over {len(history.epochs)} epochs: {words}.",
    )


def _heat_map(history: History) -> Figure | None:
    """Draw the criticality of every layer; `None` without a selection."""
    if not history.selections:
        return None
    final = history.selections[-1]
    return draw(
        history.plot_heat_map,
        f"Heat map: criticality of {len(history.selections[0].measured)} layers at {len(history.selections)} "
        f"selections, the last one before epoch {final.epoch}, which chose {', '.join(final.chosen)}. The "
        "table below lists the layers chosen.",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return content


def _or_last(accuracy: float | None) -> float:
    """Rank what was not measured last."""
    return -1.0 if accuracy is None else accuracy


def write_page(folders: Iterable[Path], output: Path) -> Path:
    """
    Write the page about some runs.

    :param folders: The runs'.
    :param output: The page; one that this wrote before is replaced, anything else is not.
    :return: The page.
    :raises ValueError: If a folder is no run's, or if `output` is something else.
    """
    if output.exists() and (not output.is_file() or GENERATOR.encode() not in output.read_bytes()[:2000]):
        raise ValueError(f"{output} is something else than a page of this command; it is not overwritten.")
    page = Page()
    for folder in folders:
        page.add(folder)
    html = page.html()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(html, encoding="utf-8")
    return output
