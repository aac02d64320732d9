"""
One self-contained HTML page about one or more runs.

    python evaluation/report.py runs/quickstart runs/evaluation --output report.html

A run is a folder, with any of:

- ``report.json`` and ``verdicts.npz``, as ``evaluation/autoattack.py`` writes them;
- ``history.json`` or ``<name>-history.json``, as ``History.to_json`` writes them, and ``run.json`` with the command;
- ``model_info/<data set>/<threat model>/<model>.json``, as ``write_robustbench_entry`` writes them.

The page has the table, by threat model as RobustBench's leaderboards are, accuracy over the epochs, the best epoch
against the last, criticality heat maps, AutoAttack's waterfalls, and the commands. It loads nothing, runs no script and
opens anywhere; figures are SVG within it.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from art_clat import History, RobustnessReport
from art_clat.leaderboard.entries import leaderboard_shortfalls
from art_clat.utils.files import read
from art_clat.utils.formatting import format_eps
from art_clat.utils.plots import new_axes

TEMPLATE = Path(__file__).with_suffix(".html.j2")

#: What the page says it was made by, and what a file must say to be written over.
GENERATOR = "art_clat evaluation/report.py"

#: Of a figure, in inches: its text can be read on a telephone, whose window it fills.
WIDTH = 5.2

NORMS = {"Linf": "ℓ∞", "L2": "ℓ2", "L1": "ℓ1"}


@dataclass(frozen=True)
class Figure:
    """
    A drawing, ready for an ``img``.

    :param source: A ``data:`` address.
    :param alt: What it shows, in words.
    :param width: In CSS pixels.
    :param height: In CSS pixels.
    """

    source: str
    alt: str
    width: int
    height: int


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
        histories = sorted({*folder.glob("history.json"), *folder.glob("*-history.json")})
        histories = histories or sorted(folder.glob("last.safetensors"))  # a checkpoint of the trainer's
        entries = sorted(folder.glob("model_info/*/*/*.json"))
        if (folder / "report.json").exists():
            self._add_evaluation(name, folder)
        elif histories or entries:
            for path in entries:
                self._add_entry(path)
            if (folder / "run.json").exists():
                self.facts.append((name, _json(folder / "run.json")))
        else:
            raise ValueError(
                f"{folder} is not the folder of a run: it has none of report.json, history.json, *-history.json, "
                "last.safetensors and model_info/*/*/*.json."
            )
        for path in histories:
            which = "" if path.suffix == ".safetensors" else path.stem.removesuffix("history").rstrip("-")
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
            notes.append(f"{_percent(report.transfer_accuracy)} on adversarial examples of another network")
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
        words = ", ".join(f"{_percent(accuracy)} after {attack}" for attack, accuracy in left[1:])
        waterfall = None
        if report.attacks:
            ax = new_axes(width=0.9 + 0.72 * (len(left) + 1), height=3.4)
            waterfall = drawn(lambda: report.plot(ax), f"Waterfall: {_percent(left[0][1])} clean, {words}.")
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
        try:
            if path.suffix == ".safetensors":
                history = History.from_json(json.dumps(read(path)[1]["progress"]["history"]))
            else:
                history = History.from_json(path.read_text(encoding="utf-8"))
            last = history.epochs[-1]
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not the history of a training: {error!r}.") from error
        best = next((record for record in history.epochs if record.epoch == history.best_epoch), None)
        words = "no validation data"
        if best is not None:
            words = f"robust accuracy is best, {_percent(best.robust_accuracy)}, in epoch {best.epoch}"
            words += f" and {_percent(last.robust_accuracy)} in the last, {last.epoch}"
        heat_map = None
        if history.selections:
            final = history.selections[-1]
            heat_map = drawn(
                history.plot_heat_map,
                f"Heat map: criticality of {len(history.selections[0].measured)} layers at {len(history.selections)} "
                f"selections, the last one before epoch {final.epoch}, which chose {', '.join(final.chosen)}. The "
                "table below lists the layers chosen.",
            )

        def curves() -> Axes:
            return history.plot_curves(new_axes(width=WIDTH, height=3.6))

        self.trainings.append(
            {
                "name": name,
                "history": history,
                "best": best,
                "last": last,
                "curves": drawn(curves, f"Accuracy over {len(history.epochs)} epochs: {words}."),
                "heat_map": heat_map,
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

        def draw() -> Axes:
            ax = new_axes(width=WIDTH, height=3.6)
            for name, points in curves.items():
                epochs, values = zip(*points, strict=True)
                ax.plot(epochs, [math.nan if v is None else 100 * v for v in values], label=name, linewidth=2)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_xlabel("epoch")
            ax.set_ylabel("robust accuracy, validation [%]")
            ax.legend(fontsize=8)
            return ax

        return drawn(draw, f"Robust accuracy on the validation data over the epochs of {', '.join(curves)}.")

    def html(self) -> str:
        """
        Write the page.

        :return: HTML.
        """
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters |= {"percent": _percent, "text": _text, "breakable": _breakable}
        return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page=self, generator=GENERATOR)


def drawn(plot: Callable[[], Axes], alt: str) -> Figure:
    """
    Make a figure.

    :param plot: Draws it.
    :param alt: What it shows, in words.
    :return: The figure, as SVG.
    """
    settings = {"svg.hashsalt": "art_clat", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        figure: Any = plot().figure
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return Figure(f"data:image/svg+xml;base64,{encoded}", alt, width, height)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return content


def _or_last(accuracy: float | None) -> float:
    return -1.0 if accuracy is None else accuracy


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _breakable(name: str) -> Markup:
    """Let a long name go on in the next line after a slash or an underscore."""
    return Markup("<wbr>").join(re.split(r"(?<=[/_])", name))


def _text(value: object) -> str:
    """Write a fact, which may be anything that JSON holds, in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "–" if value is None else str(value)


def write(folders: Iterable[Path], output: Path) -> None:
    """
    Write the page about some runs.

    :param folders: The runs'.
    :param output: The page; one that this wrote before is replaced, anything else is not.
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


def main() -> None:
    """Read the runs and write the page."""
    parser = argparse.ArgumentParser(description="One self-contained HTML page about one or more runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of an evaluation or a training")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page")
    args = parser.parse_args()
    try:
        write(args.runs, args.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
