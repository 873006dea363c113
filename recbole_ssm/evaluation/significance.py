"""Whether two models differ over the same users."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from recbole_ssm.evaluation.metrics import Floats, metric

K = 10
METRICS = (f"Hit@{K}", f"NDCG@{K}", f"MRR@{K}")


def over_users(name: str, runs: Sequence[tuple[NDArray[np.str_], Floats]]) -> dict[str, float]:
    """User -> the metric's mean over that user's rows and over the runs (the seeds) given as
    (users, ranks).
    """
    total: dict[str, list[float]] = {}
    for users, ranks in runs:
        for user, value in zip(users.tolist(), metric(name, ranks).tolist()):
            total.setdefault(user, []).append(value)
    return {user: math.fsum(values) / len(values) for user, values in total.items()}


@dataclass(frozen=True)
class Pair:
    """What the users say of two models by one metric."""

    metric: str
    first: str
    second: str
    users: int
    difference: float
    """Mean of first minus second."""
    low: float
    """The 95% confidence interval of the difference, by the t distribution: from here ..."""
    high: float
    """... to here."""
    t_p: float
    """Two-sided p of the paired t-test."""
    wilcoxon_p: float
    """Two-sided p of Wilcoxon's signed-rank test; users without a difference are left out, as
    Wilcoxon did.
    """
    holm_p: float = math.nan
    """``t_p`` after Holm's correction over all pairs of one metric and data set."""


def paired(name: str, first: tuple[str, Mapping[str, float]], second: tuple[str, Mapping[str, float]]) -> Pair:
    """Test two models on the users that both have; where these are fewer than two, nothing can be said: all is NaN.

    Args:
        name: the metric.
        first: a model's name, and its values by user (:func:`over_users`).
        second: the other's.
    """
    users = sorted(set(first[1]) & set(second[1]))
    if len(users) < 2:
        return Pair(name, first[0], second[0], len(users), *[math.nan] * 5)
    difference = np.array([first[1][user] - second[1][user] for user in users])
    mean, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(users))
    if not difference.any():
        return Pair(name, first[0], second[0], len(users), 0.0, 0.0, 0.0, 1.0, 1.0)
    half = float(stats.t.ppf(0.975, len(users) - 1)) * error
    # The error is 0 where all users differ by the same.
    with np.errstate(divide="ignore"):
        t_p = float(2 * stats.t.sf(abs(np.float64(mean) / error), len(users) - 1))
    wilcoxon_p = float(stats.wilcoxon(difference, zero_method="wilcox").pvalue)
    return Pair(name, first[0], second[0], len(users), mean, mean - half, mean + half, t_p, wilcoxon_p)


def corrected(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs with Holm's correction over all of them that have a p."""
    pairs = list(pairs)
    p = iter(holm([pair.t_p for pair in pairs if not math.isnan(pair.t_p)]))
    return [pair if math.isnan(pair.t_p) else replace(pair, holm_p=next(p)) for pair in pairs]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the smallest p times n, the next times n - 1, and so
    on, never falling.
    """
    corrected, highest = [0.0] * len(p), 0.0
    for place, index in enumerate(np.argsort(p, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p) - place) * p[index]))
        corrected[index] = highest
    return corrected
