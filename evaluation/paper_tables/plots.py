"""The plots of ``results.md``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from art_clat.utils.plots import new_axes, save
from paper_tables.configuration import Study
from paper_tables.evidence import Evidence
from paper_tables.statistics import ShareGroups, interval


def plot_best_against_last(study: Study, arms: Sequence[str], evidence: Evidence, path: Path) -> None:
    """Draw AutoAttack accuracy of the best and the last epoch of every arm, one dot a seed."""
    arms = [arm for arm in arms if len(evidence.done(arm))]
    ax = new_axes(width=7.5, height=0.42 * len(arms) + 1.4)
    for row, arm in enumerate(arms):
        runs = evidence.done(arm)
        for when, offset, colour in (("last", -0.13, "C3"), ("best", 0.13, "C0")):
            values = 100 * runs[f"{when}_autoattack"].to_numpy()
            ax.plot(values, [row + offset] * len(values), "o", color=colour, alpha=0.45, markersize=4)
            mean, half = interval(values)
            known = len(values) > 2  # An interval of two seeds says nothing.
            label = f"{when} epoch" if row == 0 else None
            ax.errorbar(mean, row + offset, xerr=half if known else None, fmt="D", color=colour, label=label)
    ax.set_yticks(range(len(arms)), [study.title(arm) for arm in arms], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("AutoAttack accuracy [%]: seeds, mean and 95 % interval")
    ax.legend(fontsize=8)
    save(ax, path)


def plot_trained_share(groups: ShareGroups, path: Path) -> None:
    """Draw test accuracy against the share of the parameters that is trained; colours are objectives."""
    ax = new_axes(width=7.5, height=4.2)
    colours = {objective: f"C{at}" for at, objective in enumerate(dict.fromkeys(objective for objective, _ in groups))}
    markers = dict(zip(sorted({factor for _, factor in groups}), itertools.cycle("osD^v"), strict=False))
    for (objective, factor), arms in groups.items():
        shares, means = zip(*((share, np.mean(accuracies)) for share, accuracies in arms), strict=True)
        halves = [interval(accuracies)[1] if len(accuracies) > 2 else 0 for _, accuracies in arms]
        ax.errorbar(
            shares, means, yerr=halves, fmt=markers[factor], color=colours[objective], alpha=0.75, elinewidth=0.8,
            label=f"{objective}, learning rate × {factor:g}",
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel("parameters trained [%]")
    ax.set_ylabel("PGD-20 accuracy [%], last epoch")
    ax.get_figure().legend(loc="outside upper center", ncols=3, fontsize=8)  # type: ignore[union-attr]
    save(ax, path)
