"""A hook that keeps the rank of every user's target: any metric follows from them, and models
are compared by them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_ssm import distributed
from recbole_ssm.evaluation.ranks import ranks_of
from recbole_ssm.trainer.hooks import Hook, Training


class Ranks(Hook):
    """Keeps the rank of the target of every row of the newest evaluation with full ranking.

    After a run these are the ranks of the test, of all processes. The scores themselves are
    gone with their batch.
    """

    def __init__(self) -> None:
        # Of each batch the internal user ids and the ranks.
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._tokens: Any = None
        self.users = np.empty(0, dtype=np.str_)
        """User tokens as in the data set's file ``[rows]``."""
        self.ranks = np.empty(0)
        """The rank of the row's target ``[rows]``, see
        :func:`recbole_ssm.evaluation.ranks.ranks_of`.
        """

    def on_evaluation_start(self, trainer: Training) -> None:
        """Forget the evaluation before."""
        self._batches = []

    def on_ranking(
        self,
        trainer: Training,
        dataset: Any,
        interaction: Any,
        scores: Tensor,
        row: Tensor,
        item: Tensor,
    ) -> None:
        """Count a batch's ranks."""
        self._tokens = dataset.field2id_token[dataset.uid_field]
        users = interaction[dataset.uid_field].cpu()[row.cpu()]
        ranks = ranks_of(scores, row.to(scores.device), item.to(scores.device))
        self._batches.append((users, ranks.cpu()))

    def on_evaluation_end(self, trainer: Training, result: dict[str, float]) -> None:
        """Put the batches together."""
        if self._batches:
            users, ranks = (distributed.gather_rows(torch.cat(column)) for column in zip(*self._batches))
            self.users = np.array(self._tokens)[users.numpy()].astype(np.str_)
            self.ranks = ranks.numpy()
            self._batches = []
