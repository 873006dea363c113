"""The rank of a target among all items, and the metrics that follow from it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def ranks_of(scores_RV: Tensor, row_T: Tensor, item_T: Tensor) -> Tensor:
    """Ranks of target items among all items, 1 the best.

    Items of one score share the mean of their ranks, so a model that scores all alike is not
    taken for a good one (:func:`torch.topk` orders ties as it likes). What cannot be compared
    with the target (NaN) stands before it.

    Args:
        scores_RV: scores of all items ``[rows, items]``.
        row_T: the row of each target ``[targets]``.
        item_T: its item ``[targets]``.

    Returns:
        ``[targets]``, float64, from 1 to the number of items.
    """
    # The scores are not copied where each row has its one target.
    one_each = torch.equal(row_T, torch.arange(len(scores_RV), device=row_T.device))
    scores_TV = scores_RV if one_each else scores_RV[row_T]
    target_T1 = scores_TV.gather(1, item_T[:, None])
    items = scores_TV.shape[1]
    below = (scores_TV < target_T1).sum(1)
    # A target of NaN does not even equal itself.
    alike = (scores_TV == target_T1).sum(1).clamp(min=1)
    return items - below - (alike - 1).double() / 2


def metric(name: str, ranks: Floats) -> Floats:
    """A metric of every row, as RecBole defines it, from the rank of its one target.

    Args:
        name: ``Hit@k``, ``NDCG@k`` or ``MRR@k``.
        ranks: ``[rows]``, 1 the best.

    Returns:
        ``[rows]``: 1, 1 / log2(rank + 1) or 1 / rank where the rank is within k, else 0.
    """
    kind, _, cutoff = name.partition("@")
    gain = {"Hit": np.ones_like(ranks), "NDCG": 1 / np.log2(ranks + 1), "MRR": 1 / ranks}[kind]
    return np.where(ranks <= int(cutoff), gain, 0.0)
