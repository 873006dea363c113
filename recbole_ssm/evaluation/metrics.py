"""RecBole's ranking metrics: from the ranks of the targets, or from the first items of the lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_ssm.errors import UserError
from recbole_ssm.evaluation.ranks import PROTOCOLS, Ranking

Floats = NDArray[np.float64]
OF_RANKS = ("hit", "recall", "precision", "mrr", "map", "ndcg", "gauc")
OF_ITEMS = ("itemcoverage", "averagepopularity", "shannonentropy", "giniindex", "tailpercentage")


class Result(dict[str, float]):
    """RecBole's metrics of an evaluation, in lists that hold the items of the histories too.

    ``masked`` are the same without those items; it is empty where scores are compared with labels.
    """

    def __init__(self, unmasked: Mapping[str, float], masked: Mapping[str, float] | None = None) -> None:
        super().__init__(unmasked)
        self.masked = dict(masked or {})

    def both(self) -> dict[str, float]:
        """All in one: ``hit@10`` and ``masked hit@10``."""
        return {**self, **{f"masked {name}": value for name, value in self.masked.items()}}

    def __str__(self) -> str:
        """Both on lines of their own."""
        lines = {"unmasked": self, "masked": self.masked}
        return "\n".join(
            f"{name:8}  " + "    ".join(f"{key} : {value}" for key, value in values.items())
            for name, values in lines.items()
            if values
        )


def metric(name: str, ranks: Floats) -> Floats:
    """A metric of every row, as RecBole defines it, from the rank of its one target.

    Args:
        name: ``Hit@k``, ``Recall@k``, ``Precision@k``, ``MRR@k``, ``MAP@k`` or ``NDCG@k``.
        ranks: ``[rows]``, 1 the best.

    Returns:
        ``[rows]``: 0 where the rank is beyond k; else 1, of precision 1 / k, of MRR and MAP 1 / rank, of NDCG
        1 / log2(rank + 1).
    """
    kind, _, cutoff = name.lower().partition("@")
    k = int(cutoff)
    if kind in ("hit", "recall", "precision"):
        gain = np.full_like(ranks, 1 / k if kind == "precision" else 1.0)
    else:
        gain = 1 / np.log2(ranks + 1) if kind == "ndcg" else 1 / ranks
    return np.where(ranks <= k, gain, 0.0)


def gauc(ranks: Floats, listed: NDArray[np.int64]) -> float:
    """RecBole's GAUC: the mean share of a list's other items that stand behind the target; lists of one are left out.

    Args:
        ranks: ``[rows]``, 1 the best.
        listed: how many items stand in each list ``[rows]``.
    """
    rows = listed > 1
    return float(((listed - ranks)[rows] / (listed - 1)[rows]).mean()) if rows.any() else float("nan")


def result(ranking: Ranking, config: Any, training: Any) -> Result:
    """The metrics that a configuration asks for, rounded to ``metric_decimal_place``.

    Args:
        ranking: the rows.
        config: ``metrics``, ``topk`` and ``metric_decimal_place`` count.
        training: the training set, whose items AveragePopularity and TailPercentage count.

    Raises:
        UserError: a metric needs the training set and there is none.
    """
    return Result(*(_metrics(ranking, protocol, config, training) for protocol in range(len(PROTOCOLS))))


def _metrics(ranking: Ranking, protocol: int, config: Any, training: Any) -> dict[str, float]:
    ranks = ranking.ranks[:, protocol]
    values: dict[str, float] = {}
    for name in map(str.lower, config["metrics"]):
        if name == "gauc":
            values[name] = gauc(ranks, ranking.listed[:, protocol])
        elif name in OF_RANKS:
            values |= {f"{name}@{k}": float(metric(f"{name}@{k}", ranks).mean()) for k in config["topk"]}
        else:
            best = ranking.best[:, protocol]
            values |= {f"{name}@{k}": of_items(name, best[:, :k], config, training) for k in config["topk"]}
    return {name: round(value, config["metric_decimal_place"]) for name, value in values.items()}


def of_items(name: str, best: NDArray[np.int64], config: Any, training: Any) -> float:
    """A metric of what is recommended, as RecBole defines it, right or wrong.

    Args:
        name: one of :data:`OF_ITEMS`.
        best: the first items of each list ``[rows, k]``.
        config: its ``tail_ratio`` says which items are the tail.
        training: the training set.
    """
    if training is None:
        raise UserError(f"metrics: {name} needs the training set; evaluate by a loader of create_loaders")
    item_num = training.item_num  # RecBole counts the padding as an item
    items, counts = np.unique(best, return_counts=True)
    share = counts / best.size
    if name == "itemcoverage":
        return len(items) / item_num
    if name == "shannonentropy":
        return float(-(share * np.log(share)).sum() / len(items))
    if name == "giniindex":
        place = np.arange(item_num - len(items) + 1, item_num + 1)
        return float(((2 * place - item_num - 1) * np.sort(share)).sum() / item_num)
    popularity = np.bincount(training.inter_feat[training.iid_field].numpy(), minlength=item_num)
    if name == "averagepopularity":
        return float((popularity[items] * share).sum())
    return float(share[np.isin(items, tail(popularity, config["tail_ratio"]))].sum())


def tail(popularity: NDArray[np.int64], ratio: float | None) -> NDArray[np.int64]:
    """The items of the long tail: of those that occur in training the share that occurs least, one at least.

    Args:
        popularity: how often each item occurs ``[V]``; of equals, those of the smallest ids come first.
        ratio: the share; None or 0 is 0.1.
    """
    order = np.argsort(popularity, kind="stable")
    order = order[popularity[order] > 0]
    return order[: max(int(len(order) * (ratio or 0.1)), 1)]
