"""What a ranker makes of its retriever's candidates: both orders measured, for everybody and
for those it can help.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recbole_ssm import clock, distributed
from recbole_ssm.evaluation.metrics import metric
from recbole_ssm.files import write_json
from recbole_ssm.trainer.hooks import Hook, Training

RETRIEVER, LANGUAGE_MODEL, FUSED = "retriever", "language model", "fused"


class Reranked(NamedTuple):
    """The candidates of a batch of evaluation, as both models score them."""

    target: Tensor
    """The column of the item that came ``[B]``; -1 where it was not retrieved."""
    language: Tensor
    """Log-probabilities of the language model over the candidates ``[B, C]``; NaN where it was
    not asked.
    """
    retriever: Tensor
    """The same of the retriever ``[B, C]``."""


def fuse(language: Tensor, retriever: Tensor, weight: float) -> Tensor:
    """``(1 - weight) language + weight retriever``, of log-probabilities over the same
    candidates ``[B, C]``.
    """
    return (1 - weight) * language + weight * retriever


def target_ranks(scores: Tensor, target: Tensor) -> Tensor:
    """Ranks ``[B]``, 1 the best, of the target's column ``[B]`` among scores ``[B, C]``; of
    equals the first wins.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    return (order == target[:, None]).int().argmax(1) + 1


class Reranking(Hook):
    """Measures LlamaRec's candidates in the retriever's order, in the language model's, and in that of both fused.

    ``overall`` counts a user whose target was not retrieved as a miss. ``retrieved`` leaves
    such users out: there the language model decides everything. After every evaluation the
    report is logged, and written to ``reranking.json`` in the run's folder, if it has one.

    The report's ``seconds_per_user`` are this process's, for those users for whom the language
    model was run now. There are none in a validation whose answers the tuning before it has
    found.
    """

    def __init__(self) -> None:
        self.report: dict[str, Any] = {}
        self.ranks: dict[str, np.ndarray] = {}
        """Order -> the rank of each row's target among the candidates; infinite where it was
        not retrieved.
        """
        self._begin = self._seconds = 0.0

    def on_evaluation_start(self, trainer: Training) -> None:
        """Ask the model to record what it sees."""
        trainer.model.records, trainer.model.asked = [], 0
        self._seconds = 0.0

    def on_evaluation_batch_start(self, trainer: Training) -> None:
        """Start the clock."""
        self._begin = clock.now()

    def on_scores(self, trainer: Training, rows: int) -> None:
        """Stop the clock; the model's records are on the CPU already, so a GPU is done."""
        self._seconds += clock.now() - self._begin

    def on_evaluation_end(self, trainer: Training, result: dict[str, float]) -> None:
        """Measure, log and write."""
        model: Any = trainer.model
        records, model.records = model.records, None
        if not records:
            return
        mine = [torch.cat(column) for column in zip(*records)]
        everyone = Reranked(*map(distributed.gather_rows, mine))
        cutoffs = [k for k in trainer.config["topk"] if k <= everyone.language.shape[1]]
        self.ranks = ranks_of(everyone, float(model.fusion))
        self.report = report(self.ranks, cutoffs or [everyone.language.shape[1]])
        self.report["fusion_weight"] = float(model.fusion)
        self.report["seconds_per_user"] = self._seconds / model.asked if model.asked else None
        trainer.logger.info(text(self.report))
        if trainer.folder is not None and distributed.rank() == 0:
            write_json(trainer.folder / "reranking.json", self.report)

    def on_fit_end(self, trainer: Training) -> None:
        """Forget the last validation; what comes now is the test."""
        self.report, self.ranks = {}, {}

    def result(self) -> dict[str, Any]:
        """``reranking``, the report, and ``ranks`` of the newest evaluation, which after a run
        is the test; empty where there is none.
        """
        return {"reranking": self.report, "ranks": self.ranks}


def ranks_of(records: Reranked, weight: float) -> dict[str, np.ndarray]:
    """Order -> ranks of the targets ``[rows]``, infinite where they are no candidates."""
    target, language, retriever = records
    found = target >= 0
    orders = {
        RETRIEVER: retriever,
        LANGUAGE_MODEL: language,
        FUSED: fuse(language, retriever, weight),
    }
    ranks = {}
    for name, scores in orders.items():
        ranks[name] = np.full(len(target), np.inf)
        ranks[name][found.numpy()] = target_ranks(scores[found], target[found]).numpy()
    return ranks


def report(ranks: dict[str, np.ndarray], cutoffs: list[int]) -> dict[str, Any]:
    """Users, how many of them were retrieved, and each order's metrics ``overall`` and among
    the ``retrieved``.
    """
    found = np.isfinite(ranks[RETRIEVER])
    return {
        "users": len(found),
        "retrieved_users": int(found.sum()),
        "retrieved": {name: metrics(values[found], cutoffs) for name, values in ranks.items()},
        "overall": {name: metrics(values, cutoffs) for name, values in ranks.items()},
    }


def metrics(ranks: np.ndarray, cutoffs: list[int]) -> dict[str, float]:
    """Mean Hit, NDCG and MRR at each cut-off, from the targets' ranks ``[n]``, 1 the best; 0
    where n is 0.
    """
    names = [f"{kind}@{cutoff}" for cutoff in cutoffs for kind in ("Hit", "NDCG", "MRR")]
    return {name.lower(): float(metric(name, ranks).mean()) if len(ranks) else 0.0 for name in names}


def text(found: dict[str, Any]) -> str:
    """The report as a table."""
    names = list(next(iter(found["overall"].values())))
    seconds = found["seconds_per_user"]
    lines = [
        f"{found['retrieved_users']} of {found['users']} users had their target among the candidates; "
        f"fusion weight {found['fusion_weight']:.2f}" + ("" if seconds is None else f", {seconds:.3f} s a user"),
        f"{'':26}" + "".join(f"{name:>9}" for name in names),
    ]
    for part in ("overall", "retrieved"):
        for order, values in found[part].items():
            lines.append(f"  {part:9} {order:14}" + "".join(f"{values[name]:9.4f}" for name in names))
    return "\n".join(lines)
