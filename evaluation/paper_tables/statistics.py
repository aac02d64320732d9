"""Intervals, paired tests and rank correlations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from paper_tables.configuration import Study
from paper_tables.evidence import Evidence

#: By objective and learning-rate factor: each arm's share of trained parameters and its accuracies, in percent.
ShareGroups = dict[tuple[str, float], list[tuple[float, list[float]]]]


def interval(values: ArrayLike) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % confidence interval (Student's t); NaN for one value."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan")
    if np.ptp(values) == 0:
        return mean, 0.0
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return mean, float(high - low) / 2


def paired(values: ArrayLike, reference: ArrayLike) -> tuple[float, float, float]:
    """Return the mean difference, half its 95 % interval and the p-value of the paired t-test; NaN for no spread."""
    values, reference = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    difference = values - reference
    mean = float(difference.mean())
    if len(difference) < 2 or np.ptp(difference) < 1e-12:  # Rounding is no spread to judge by.
        return mean, float("nan"), float("nan")
    test = stats.ttest_rel(values, reference)
    low, high = test.confidence_interval(0.95)
    return mean, float(high - low) / 2, float(test.pvalue)


def trained_share(study: Study, evidence: Evidence, arms: Sequence[str], seeds: Sequence[int]) -> ShareGroups:
    """
    Group the arms that robust overfitting is compared among: test PGD-20 after the last epoch, one figure a seed.

    Left out are arms without all seeds, with other first stages, without further epochs, with averaged weights or with
    frozen norms.
    """
    groups: ShareGroups = {}
    for name in arms:
        arm, runs = study.arm(name), evidence.done(name)
        trainer = arm.get("trainer", {})
        other_question = "base" in arm or arm.get("epochs") == 0 or trainer.keys() & {"ema_decay", "freeze_norms"}
        if len(runs) < len(seeds) or other_question:
            continue
        objective = "pgd_at" if arm.get("whole_network") else trainer.get("objective", "adversarial")
        factor = runs["tuned"].iloc[0].get("lr", arm.get("lr", 1.0))
        share = 100 * float(np.mean(runs["trainable_share"].to_numpy()))
        groups.setdefault((objective, factor), []).append((share, [100 * pgd20 for pgd20 in runs["last_pgd20"]]))
    return groups


def share_correlation(groups: ShareGroups) -> tuple[float, float, int] | None:
    """
    Correlate accuracy with the trained share among arms that differ in nothing else.

    :return: Spearman's ρ, the learning-rate factor and the number of arms; `None` for fewer than three arms.
    """
    # Arms with another objective may differ in λ.
    alike = {factor: arms for (objective, factor), arms in groups.items() if objective == "pgd_at"}
    factor, arms = max(alike.items(), key=lambda group: len(group[1]), default=(1.0, []))
    if len(arms) < 3:
        return None
    rho = stats.spearmanr([share for share, _ in arms], [np.mean(accuracies) for _, accuracies in arms]).statistic
    return float(rho), factor, len(arms)


def compare_rankings(pairs: Sequence[tuple[ArrayLike, ArrayLike]]) -> tuple[float, float, float, float]:
    """Return mean, least and largest Spearman's ρ of pairs, and the share of pairs with the same first place."""
    correlations = [stats.spearmanr(one, other).statistic for one, other in pairs]
    same = np.mean([np.argmax(one) == np.argmax(other) for one, other in pairs])
    return float(np.mean(correlations)), float(min(correlations)), float(max(correlations)), float(same)
