"""The rank of every user's target, from which any ranking metric follows and by which models are paired."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recbole_ssm import distributed
from recbole_ssm.trainer.hooks import Hook

if TYPE_CHECKING:
    from recbole_ssm.trainer.trainer import Trainer


def ranks_of(scores_RV: Tensor, row_T: Tensor, item_T: Tensor) -> Tensor:
    """Ranks of target items among all items, 1 the best.

    Items of one score share the mean of their ranks, so a model that scores all alike is not taken for a good one
    (:func:`torch.topk` orders ties as it likes). What cannot be compared with the target (NaN) stands before it.

    Args:
        scores_RV: scores of all items ``[rows, items]``.
        row_T: the row of each target ``[targets]``.
        item_T: its item ``[targets]``.

    Returns:
        ``[targets]``, float64, from 1 to the number of items.
    """
    one_each = torch.equal(row_T, torch.arange(len(scores_RV), device=row_T.device))
    scores_TV = scores_RV if one_each else scores_RV[row_T]  # without a copy where it can be
    target_T1 = scores_TV.gather(1, item_T[:, None])
    items = scores_TV.shape[1]
    below = (scores_TV < target_T1).sum(1)
    alike = (scores_TV == target_T1).sum(1).clamp(min=1)  # a NaN is not even like itself
    return items - below - (alike - 1).double() / 2


class Ranks(Hook):
    """Keeps the rank of the target of every row of the last evaluation; full ranking only.

    After a run these are the ranks of the test. The scores themselves are gone with their batch.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor]] = []  # internal user ids, ranks
        self._tokens: Any = None
        self.users = np.empty(0, dtype=np.str_)
        """User tokens as in the data set's file ``[rows]``."""
        self.ranks = np.empty(0)
        """The rank of the row's target ``[rows]``, see :func:`ranks_of`."""

    def on_evaluation_start(self, trainer: Trainer) -> None:
        """Forget the evaluation before."""
        self._batches = []

    def on_ranking(
        self, trainer: Trainer, dataset: Any, interaction: Any, scores: Tensor, row: Tensor, item: Tensor
    ) -> None:
        """Count a batch's ranks."""
        self._tokens = dataset.field2id_token[dataset.uid_field]
        users, row = interaction[dataset.uid_field].cpu()[row.cpu()], row.to(scores.device)
        self._batches.append((users, ranks_of(scores, row, item.to(scores.device)).cpu()))

    def on_evaluation_end(self, trainer: Trainer, result: dict[str, float]) -> None:
        """Put the batches together."""
        if self._batches:
            users, ranks = (distributed.gather_rows(torch.cat(column)) for column in zip(*self._batches))
            self.users, self.ranks = np.array(self._tokens)[users.numpy()].astype(np.str_), ranks.numpy()
            self._batches = []
