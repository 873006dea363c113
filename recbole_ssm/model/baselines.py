"""
Pop, RepeatNewest
################################################
Two rules that learn nothing, and that every table should hold: a model which they beat has
learned little of its data (Ferrari Dacrema et al., "Are we really making much progress?",
RecSys 2019). How often a target stands in its history already, ``recbole-ssm inspect`` says.
"""

from __future__ import annotations

from typing import Any

import torch
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_ssm.data.outline import item_counts
from recbole_ssm.model.packed import PackedRecommender


class Pop(PackedRecommender):
    """The same items for everybody: those that were training targets most often.

    Its scores order items as those of RecBole's general recommender of this name do.
    """

    input_type = InputType.POINTWISE
    popularity: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        counts = torch.from_numpy(item_counts(dataset, self.n_items)).float()
        # From 0 to below 1 [V].
        self.register_buffer("popularity", counts / (counts.max() + 1))
        # An optimiser wants a parameter, and no score depends on this one.
        self.unused = nn.Parameter(torch.zeros(1))

    def calculate_loss(self, interaction: Any) -> Tensor:
        """0, as there is nothing to learn."""
        return 0.0 * self.unused.sum()

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of one item a row."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID][:, None])[:, 0]

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, V]`` of all items."""
        return self.popularity.repeat(len(interaction[self.ITEM_SEQ_LEN]), 1)


class RepeatNewest(Pop):
    """What the history holds, its newest item first, and then the most popular of the others."""

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, V]`` of all items: the last place in the history, from 1 on, or the popularity."""
        item_seq, length = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        places = torch.arange(1, item_seq.shape[1] + 1, device=item_seq.device)
        places = torch.where(places <= length[:, None], places, 0)  # [B, L]
        return super().full_sort_predict(interaction).scatter_reduce(1, item_seq, places.float(), "amax")
