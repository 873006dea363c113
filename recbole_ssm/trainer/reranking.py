"""What a ranker makes of its retriever's candidates: both orders measured, for everybody and for those it can help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_ssm import distributed
from recbole_ssm.files import write_json
from recbole_ssm.model.llamarec import Reranked, fuse, target_ranks
from recbole_ssm.trainer.hooks import Hook

if TYPE_CHECKING:
    from recbole_ssm.trainer.trainer import SSMTrainer


class Reranking(Hook):
    """Measures LlamaRec's candidates in the retriever's order, in the language model's, and in that of both fused.

    ``overall`` counts a user whose target was not retrieved as a miss, ``retrieved`` leaves such users out: there the
    language model decides everything. After every evaluation the report is logged, and written to ``reranking.json``
    in the run's folder, if it has one.
    """

    def __init__(self) -> None:
        self.report: dict[str, Any] = {}

    def on_evaluation_start(self, trainer: SSMTrainer) -> None:
        """Ask the model for what it sees."""
        trainer.model.records = []

    def on_evaluation_end(self, trainer: SSMTrainer, result: dict[str, float]) -> None:
        """Measure, log and write."""
        model: Any = trainer.model
        records, model.records = model.records, None
        shortened, model.prompts.shortened = model.prompts.shortened, 0
        written, model.prompts.written = model.prompts.written, 0
        if not records:
            return
        mine = [torch.cat(column) for column in zip(*records)]
        everyone = Reranked(*(torch.cat(parts) for parts in zip(*distributed.gather(mine))))
        cutoffs = [k for k in trainer.config["topk"] if k <= everyone.language.shape[1]]
        self.report = report(everyone, float(model.fusion), cutoffs or [everyone.language.shape[1]])
        trainer.logger.info(text(self.report))
        if shortened:
            trainer.logger.warning(
                f"{shortened} of {written} prompts were longer than prompt_tokens or the base model's context, and "
                "lost the oldest titles of their history"
            )
        if trainer.folder is not None and distributed.rank() == 0:
            write_json(trainer.folder / "reranking.json", self.report)


def report(records: Reranked, weight: float, cutoffs: list[int]) -> dict[str, Any]:
    """Users, how many of them were retrieved, and each order's metrics ``overall`` and among the ``retrieved``."""
    found = records.target >= 0
    target, language, retriever = (column[found] for column in records)
    orders = {"retriever": retriever, "language model": language, "fused": fuse(language, retriever, weight)}
    retrieved = {name: metrics(target_ranks(scores, target), cutoffs) for name, scores in orders.items()}
    share = float(found.double().mean())
    overall = {name: {k: share * v for k, v in values.items()} for name, values in retrieved.items()}
    users = {"users": len(found), "retrieved_users": int(found.sum()), "fusion_weight": weight}
    return {**users, "retrieved": retrieved, "overall": overall}


def metrics(ranks: Tensor, cutoffs: list[int]) -> dict[str, float]:
    """Hit, NDCG and MRR at each cut-off, of the targets' ranks ``[n]``, 1 the best; 0 of no ranks."""
    ranks = ranks.double()
    found: dict[str, float] = {}
    for k in cutoffs:
        hit = (ranks <= k).double()
        values = {"hit": hit, "ndcg": hit / torch.log2(ranks + 1), "mrr": hit / ranks}
        found |= {f"{name}@{k}": float(value.mean()) if len(ranks) else 0.0 for name, value in values.items()}
    return found


def text(found: dict[str, Any]) -> str:
    """The report as a table."""
    names = list(next(iter(found["overall"].values())))
    lines = [
        f"{found['retrieved_users']} of {found['users']} users had their target among the candidates; "
        f"fusion weight {found['fusion_weight']:.2f}",
        f"{'':26}" + "".join(f"{name:>9}" for name in names),
    ]
    for part in ("overall", "retrieved"):
        lines += [
            f"  {part:9} {order:14}" + "".join(f"{values[name]:9.4f}" for name in names)
            for order, values in found[part].items()
        ]
    return "\n".join(lines)
