"""The results of an evaluation: figures, verdicts, plot and files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from art_clat.utils.formatting import format_eps
from art_clat.utils.plots import new_axes
from art_clat.utils.plots import save as save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from art_clat.robustness.plan import Settings, Step
    from art_clat.robustness.runner import Outcome

#: Whether each example is classified correctly, shape (n,).
Verdicts = npt.NDArray[np.bool_]


#: Version of what :meth:`RobustnessReport.save` writes; another one is refused.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class RobustnessReport:
    """
    The results of an evaluation. Accuracies are in [0, 1]; verdicts have one entry an example.

    :param norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
    :param eps: ε, in units of inputs in [0, 1].
    :param nb_examples: Number of examples.
    :param clean: Whether each example is classified correctly as it is.
    :param pgd: Whether it still is under PGD.
    :param pgd_max_iter: Number of PGD steps.
    :param autoattack_version: ``"standard"``, ``"plus"``, ``"rand"`` or ``"few-classes"``; `None` if AutoAttack was not
           run.
    :param warnings: What makes the figures doubtful, AutoAttack's own warnings included.
    :param seconds: Time taken by all processes together, interrupted calls included.
    :param seed: Seed of the attacks.
    :param pgd_restarts: Number of random starts of PGD.
    :param transfer: Whether it still is on the adversarial examples of another network; `None` if that was not tried.
    :param attacks: Whether it still is after each of AutoAttack's attacks and those before it, in their order; empty if
           AutoAttack was not run.
    :param adversarial: AutoAttack's adversarial examples (PGD's, if AutoAttack was not run), float32, shape
           (n, channels, height, width); examples that withstood, or were misclassified anyway, are unchanged.
    """

    norm: str
    eps: float
    nb_examples: int
    clean: Verdicts
    pgd: Verdicts
    pgd_max_iter: int
    autoattack_version: str | None
    warnings: tuple[str, ...]
    seconds: float
    seed: int
    pgd_restarts: int = 1
    transfer: Verdicts | None = None
    attacks: dict[str, Verdicts] = dataclasses.field(default_factory=dict)
    adversarial: npt.NDArray[np.float32] | None = dataclasses.field(default=None, repr=False)

    @property
    def autoattack(self) -> Verdicts | None:
        """Whether each example is still classified correctly after the last of AutoAttack's attacks."""
        return next(reversed(self.attacks.values()), None)

    @property
    def clean_accuracy(self) -> float:
        """Share of examples classified correctly."""
        return float(self.clean.mean())

    @property
    def pgd_accuracy(self) -> float:
        """Share of examples classified correctly as they are and under PGD."""
        return float(self.pgd.mean())

    @property
    def transfer_accuracy(self) -> float | None:
        """Share of examples classified correctly as they are and as another network's adversarial examples."""
        return None if self.transfer is None else float(self.transfer.mean())

    @property
    def autoattack_accuracy(self) -> float | None:
        """Share of examples that AutoAttack could not get misclassified; `None` if it was not run."""
        return None if self.autoattack is None else float(self.autoattack.mean())

    def to_dict(self) -> dict[str, Any]:
        """
        Return the figures without the arrays, ready for JSON.

        :return: Every field that is no array, the accuracies, and under ``"attacks"`` the accuracy after each of
                 AutoAttack's attacks.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays = ("clean", "pgd", "transfer", "attacks", "adversarial")
        return {
            **{name: value for name, value in fields.items() if name not in arrays},
            "warnings": list(self.warnings),
            "clean_accuracy": self.clean_accuracy,
            "pgd_accuracy": self.pgd_accuracy,
            "transfer_accuracy": self.transfer_accuracy,
            "autoattack_accuracy": self.autoattack_accuracy,
            "attacks": {name: float(verdicts.mean()) for name, verdicts in self.attacks.items()},
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """
        Draw what each of AutoAttack's attacks takes from the clean accuracy, as a waterfall.

        :param ax: Where to draw, or `None` for a new figure.
        :return: The axes.
        :raises ValueError: If AutoAttack was not run.
        """
        if not self.attacks:
            raise ValueError("There is no waterfall to draw: AutoAttack was not run.")
        ax = ax if ax is not None else new_axes(width=2.5 + 1.1 * len(self.attacks), height=3.6)
        left = [100 * self.clean_accuracy, *(100 * float(verdicts.mean()) for verdicts in self.attacks.values())]
        names = ["clean", *self.attacks, "robust"]
        steps = [before - after for before, after in itertools.pairwise(left)]
        heights, bottoms = [left[0], *steps, left[-1]], [0.0, *left[1:], 0.0]
        ax.bar(names, heights, bottom=bottoms, color=["C0", *["C3"] * len(steps), "C2"])
        for position, (height, bottom) in enumerate(zip(heights, bottoms, strict=True)):
            sign = "−" if height and 0 < position < len(names) - 1 else ""
            ax.annotate(
                f"{sign}{height:.1f}",
                (position, height + bottom),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
            )
        for position, height in enumerate(left):
            ax.plot([position, position + 1], [height, height], color="grey", linewidth=0.7)
        ax.set_ylim(0, 105)
        ax.set_ylabel("accuracy [%]")
        ax.set_title(f"{self._autoattack()}, {self._title()}", fontsize=9)
        return ax

    def save(self, folder: str | os.PathLike[str], **about: object) -> None:
        """
        Write ``report.json``, ``verdicts.npz``, ``adversarial.pt`` and, if AutoAttack was run, ``waterfall.png``.

        The figures are :meth:`to_dict`'s. Verdicts are boolean arrays ``clean``, ``pgd``, ``transfer`` and
        ``autoattack/<attack>``; the adversarial examples are one tensor for ``torch.load(path, weights_only=True)``.

        :param folder: Created if missing; files of these names are replaced.
        :param about: What else ``report.json`` shall hold, such as model, data, command and date.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        verdicts = {"clean": self.clean, "pgd": self.pgd}
        if self.transfer is not None:
            verdicts["transfer"] = self.transfer
        verdicts |= {f"autoattack/{name}": robust for name, robust in self.attacks.items()}
        with (folder / "verdicts.npz").open("wb") as file:
            np.savez_compressed(file, **verdicts)  # type: ignore[arg-type]  # a keyword of it
        if self.adversarial is not None:
            torch.save(torch.as_tensor(self.adversarial), folder / "adversarial.pt")
        if self.attacks:
            save_figure(self.plot(), folder / "waterfall.png")
        text = json.dumps({"format": FORMAT, **self.to_dict(), **about}, indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> tuple[RobustnessReport, dict[str, Any]]:
        """
        Read what :meth:`save` wrote, without the adversarial examples. Nothing in the files is ever executed.

        :param folder: The folder.
        :return: The report, and what else ``report.json`` holds.
        :raises ValueError: If the folder holds no report, or one of another format, or files that are damaged or do not
                belong together.
        """
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise ValueError(f"`folder`: {folder} holds no evaluation: there is no report.json.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("format") != FORMAT:
                raise ValueError(f"its format is {content.get('format')}, this version of art_clat reads {FORMAT}")
            with np.load(path.with_name("verdicts.npz"), allow_pickle=False) as file:
                verdicts: dict[str, Any] = {name: file[name] for name in ("clean", "pgd")}
                verdicts["transfer"] = file["transfer"] if "transfer" in file.files else None
                attacks = {name: file[f"autoattack/{name}"] for name in content["attacks"]}
            fields = {field.name for field in dataclasses.fields(cls)} & content.keys()
            report = cls(
                **{name: content[name] for name in fields - {"attacks", "warnings"}},
                **verdicts,
                attacks=attacks,
                warnings=tuple(content["warnings"]),
            )
            figures = report.to_dict()
            if len(report.clean) != report.nb_examples or any(content[name] != figures[name] for name in figures):
                raise ValueError("its figures are not those of the verdicts in verdicts.npz")
        except KeyError as error:
            raise ValueError(f"`folder`: the evaluation in {folder} cannot be read: it lacks {error}.") from error
        except (OSError, TypeError, AttributeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"`folder`: the evaluation in {folder} cannot be read: {error}.") from error
        return report, {name: value for name, value in content.items() if name not in {"format", *figures}}

    def __str__(self) -> str:
        restarts = f", {self.pgd_restarts} restarts" if self.pgd_restarts > 1 else ""
        rows = [("clean", self.clean_accuracy), (f"PGD-{self.pgd_max_iter}{restarts}", self.pgd_accuracy)]
        if self.transfer_accuracy is not None:
            rows.append(("transfer", self.transfer_accuracy))
        rows += [(f"  after {name}", float(verdicts.mean())) for name, verdicts in self.attacks.items()]
        if self.autoattack_accuracy is not None:
            rows.append((self._autoattack(), self.autoattack_accuracy))
        width = max(24, *(len(name) + 1 for name, _ in rows))
        lines = [f"  {name:<{width}}{100 * value:6.2f} %" for name, value in rows]
        return "\n".join([self._title(), *lines, *(f"  ! {message}" for message in self.warnings)])

    def _autoattack(self) -> str:
        if self.autoattack_version == "few-classes":
            return "AutoAttack's parts for few classes (not standard)"
        return f"AutoAttack ({self.autoattack_version})"

    def _title(self) -> str:
        return f"{self.norm}, ε = {format_eps(self.eps, self.norm)}, {self.nb_examples} examples"


def make_report(
    settings: Settings,
    images: torch.Tensor,
    plan: Sequence[Step],
    outcomes: Mapping[str, Outcome],
    warnings: Iterable[str],
) -> RobustnessReport:
    """
    Make a report of what came out of an evaluation.

    :param settings: What it was run with; the report repeats them.
    :param images: The examples, shape (n, channels, height, width), on the CPU.
    :param plan: The steps that were run.
    :param outcomes: The outcome of each step, by name.
    :param warnings: What makes the figures doubtful; the report has each once.
    :return: The report.
    """
    verdicts = {name: outcome.robust.numpy() for name, outcome in outcomes.items()}
    attacks = [step.name for step in plan if step.of_autoattack]
    adversarial = images.clone()
    for name in attacks or ["pgd"]:
        adversarial[outcomes[name].fooled] = outcomes[name].adversarial
    return RobustnessReport(
        norm=settings.norm,
        eps=settings.eps,
        nb_examples=len(images),
        clean=verdicts["clean"],
        pgd=verdicts["pgd"],
        pgd_max_iter=settings.pgd_max_iter,
        pgd_restarts=settings.pgd_restarts,
        transfer=verdicts.get("transfer"),
        autoattack_version=settings.autoattack_version,
        attacks={name: verdicts[name] for name in attacks},
        adversarial=adversarial.numpy(),
        warnings=tuple(dict.fromkeys(warnings)),
        seconds=sum(outcome.seconds for outcome in outcomes.values()),
        seed=settings.seed,
    )
