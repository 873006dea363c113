"""A hook that keeps the rank of every user's target: any metric follows from them, and models
are compared by them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recbole_ssm.evaluation.ranks import Ranking
from recbole_ssm.trainer.hooks import Hook, Training


class Ranks(Hook):
    """Keeps the rank of the target of every row of the newest evaluation that ranks.

    After a run these are the ranks of the test, of all processes. What a rank is stands in
    :mod:`recbole_ssm.evaluation.ranks`.
    """

    def __init__(self) -> None:
        self.users = np.empty(0, dtype=np.str_)
        """User tokens as in the data set's file ``[rows]``."""
        self.ranks = np.empty(0)
        """The rank of the row's target ``[rows]``, in a list that holds the items of the history too."""
        self.masked = np.empty(0)
        """The rank in a list without the items of the history ``[rows]``."""

    def on_ranking(self, trainer: Training, ranking: Ranking, dataset: Any) -> None:
        """Keep them."""
        self.users = np.array(dataset.field2id_token[dataset.uid_field])[ranking.user].astype(np.str_)
        self.ranks, self.masked = ranking.ranks.T
