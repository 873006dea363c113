"""RecBole's ranking metrics: from the ranks of the targets, or from the first items of the lists."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_ssm.data.outline import item_counts
from recbole_ssm.errors import UserError
from recbole_ssm.evaluation.ranks import PROTOCOLS, Ranking
from recbole_ssm.keys import MASKED, OF_RANKS

Floats = NDArray[np.float64]
HOUR = 3600
# Groups of targets by the time since the event before; the second kind where all such times are whole days.
SAME_MOMENT, WITHIN_AN_HOUR, AFTER_AN_HOUR = (
    "at the moment of the event before",
    "within an hour of the event before",
    "more than an hour after the event before",
)
SAME_DAY, LATER_DAY = "on the day of the event before", "on a later day than the event before"
PAUSES = (SAME_MOMENT, WITHIN_AN_HOUR, AFTER_AN_HOUR, SAME_DAY, LATER_DAY)
OF_ITEMS = ("itemcoverage", "averagepopularity", "shannonentropy", "giniindex", "tailpercentage")


class Result(dict[str, float]):
    """RecBole's metrics of an evaluation, in lists that hold the items of the histories too, as Python's numbers.

    ``masked`` are the same without those items; it is empty where scores are compared with labels. ``protocol`` is what
    :func:`protocol` says, where it was asked for, and ``ranking`` the rows, where targets were ranked. Of a test,
    ``by_group`` is what :func:`by_group` says, and ``shuffled_times`` the result of a model of ``time: query`` with its
    query times shuffled among the users.
    """

    def __init__(self, unmasked: Mapping[str, float], masked: Mapping[str, float] | None = None) -> None:
        super().__init__({name: float(value) for name, value in unmasked.items()})
        self.masked = {name: float(value) for name, value in (masked or {}).items()}
        self.protocol: dict[str, Any] = {}
        self.ranking: Ranking | None = None
        self.by_group: dict[str, dict[str, float]] = {}
        self.shuffled_times: Result | None = None

    def __missing__(self, name: str) -> float:
        """The figure of ``masked ndcg@10``, as :meth:`both` calls it."""
        if not name.startswith(MASKED):
            raise KeyError(name)
        return self.masked[name.removeprefix(MASKED)]

    def both(self) -> dict[str, float]:
        """All in one: ``hit@10`` and ``masked hit@10``."""
        return {**self, **{MASKED + name: value for name, value in self.masked.items()}}

    def table(self, title: str = "") -> str:
        """All as aligned columns under a title, a line for each metric, and what masked means."""
        parts = {title: self}
        if self.shuffled_times is not None:
            parts["query times shuffled"] = self.shuffled_times
        width = max(len(name) for name in [*parts, *self])
        lines = []
        for heading, part in parts.items():
            lines.append(f"{heading:{width}}  unmasked" + "  history masked" * bool(self.masked))
            for name, value in part.items():
                masked = f"  {part.masked[name]:14.4f}" if name in part.masked else ""
                lines.append(f"{name:{width}}  {value:8.4f}{masked}")
        if self.masked:
            lines.append("(history masked: items that the user had before are left out of the list)")
        return "\n".join(lines)

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
    found = Result(*(_metrics(ranking, protocol, config, training) for protocol in range(len(PROTOCOLS))))
    found.ranking = ranking
    return found


def protocol(config: Any) -> dict[str, Any]:
    """What figures of a configuration must be stated with: ``split``, ``mode``, ``ties`` and ``seed``.

    There is a ``ties_seed`` where ties are ordered at random. Masked and unmasked figures have names of their own.
    """
    found = {key: config["eval_args"][key] for key in ("split", "mode")} | {"ties": config["ties"]}
    if config["ties"] == "random":
        found["ties_seed"] = config["ties_seed"]
    return {**found, "seed": config["seed"]}


def by_group(
    ranking: Ranking,
    config: Any,
    events: NDArray[np.int64],
    pauses: NDArray[np.int64] | None = None,
    whole_days: bool = False,
) -> dict[str, dict[str, float]]:
    """The metrics of ranks among targets of frequent and of rare items, after short and long histories, and by the
    time since the event before.

    Args:
        ranking: the rows.
        config: as of :func:`result`.
        events: how often each item occurs in training ``[V]``. The head is the fifth of the items that occur most.
        pauses: the seconds from the event before to the target ``[n]``; None where there are no clock times.
        whole_days: whether times are dates without hours.

    Returns:
        For each group that has any, ``targets``, how many, and its metrics, as :meth:`Result.both` names them.
    """
    order = np.argsort(-events, kind="stable")[: np.count_nonzero(events)]
    head = np.isin(ranking.item, order[: -(-len(order) // 5)])
    unseen = events[ranking.item] == 0
    groups = {"head items": head, "tail items": ~head & ~unseen, "items that training never saw": unseen}
    lengths = ranking.events
    bounds = [-1, *np.quantile(lengths, [1 / 3, 2 / 3, 1], method="inverted_cdf")] if len(lengths) else []
    for low, high in itertools.pairwise(bounds):
        rows = (lengths > low) & (lengths <= high)
        if rows.any():
            groups[f"histories of {lengths[rows].min()} to {high} events"] = rows
    groups |= {} if pauses is None else _by_pause(pauses, whole_days)
    names = [name for name in config["metrics"] if name.lower() in OF_RANKS]
    found = {}
    for group, rows in groups.items():
        if rows.any():
            part = ranking.of_rows(rows)
            values = Result(*(_metrics(part, p, config, None, names) for p in range(len(PROTOCOLS))))
            found[group] = {"targets": int(rows.sum()), **values.both()}
    return found


def _by_pause(pauses: NDArray[np.int64], whole_days: bool) -> dict[str, NDArray[np.bool_]]:
    # A target that is older than the event before counts as of its moment, as models take it.
    if whole_days:
        return {SAME_DAY: pauses <= 0, LATER_DAY: pauses > 0}
    return {
        SAME_MOMENT: pauses <= 0,
        WITHIN_AN_HOUR: (pauses > 0) & (pauses <= HOUR),
        AFTER_AN_HOUR: pauses > HOUR,
    }


def text_of(groups: Mapping[str, Mapping[str, float]]) -> str:
    """What :func:`by_group` returns as a table."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = max(map(len, groups), default=0)
    lines = [" " * width + "".join(f"{name:>16}" for name in names)]
    for group, values in groups.items():
        lines.append(f"{group:{width}}" + "".join(f"{values[name]:16,}" for name in names))
    return "\n".join(lines)


def _metrics(
    ranking: Ranking, protocol: int, config: Any, training: Any, names: Sequence[str] | None = None
) -> dict[str, float]:
    ranks = ranking.ranks[:, protocol]
    values: dict[str, float] = {}
    for name in map(str.lower, config["metrics"] if names is None else names):
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
        best: the first items of each list ``[rows, k]``, -1 behind the end of a shorter one.
        config: its ``tail_ratio`` says which items are the tail.
        training: the training set.
    """
    if training is None:
        raise UserError(f"metrics: {name} needs the training set; evaluate by a loader of create_loaders")
    item_num = training.item_num  # RecBole counts the padding as an item
    items, counts = np.unique(best[best >= 0], return_counts=True)
    share = counts / counts.sum()
    if name == "itemcoverage":
        return len(items) / item_num
    if name == "shannonentropy":
        return float(-(share * np.log(share)).sum() / len(items))
    if name == "giniindex":
        place = np.arange(item_num - len(items) + 1, item_num + 1)
        return float(((2 * place - item_num - 1) * np.sort(share)).sum() / item_num)
    popularity = item_counts(training, item_num)
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
