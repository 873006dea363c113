"""
BERT4Rec
################################################
Reference:
    Fei Sun et al. "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations
    from Transformer." CIKM 2019, arXiv 1904.06690; in RecBole's form.
"""

from __future__ import annotations

from typing import Any

import torch
from recbole.model.sequential_recommender.bert4rec import BERT4Rec as RecBoleBERT4Rec
from torch import Tensor


class BERT4Rec(RecBoleBERT4Rec):
    """RecBole's BERT4Rec, which reads a whole history before it predicts.

    The item to come is a mask behind the history. RecBole leaves out the oldest event of every history to make room for
    it, so that one event becomes the mask alone; here only a history as long as ``MAX_ITEM_LIST_LENGTH`` makes room.
    Weights and training are RecBole's.
    """

    def reconstruct_test_data(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Histories ``[B, L]`` with the mask behind their newest events."""
        full = item_seq_len == item_seq.shape[1]
        item_seq = torch.where(full[:, None], item_seq.roll(-1, 1), item_seq)
        return item_seq.scatter(1, self._place_of_mask(item_seq, item_seq_len)[:, None], self.mask_token)

    @staticmethod
    def _place_of_mask(item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        return item_seq_len.clamp(max=item_seq.shape[1] - 1)

    def _encode(self, interaction: Any) -> Tensor:
        item_seq, item_seq_len = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        output = self.forward(self.reconstruct_test_data(item_seq, item_seq_len))
        return self.gather_indexes(output, self._place_of_mask(item_seq, item_seq_len))

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of one item a row."""
        item = interaction[self.ITEM_ID]
        return (self._encode(interaction) * self.item_embedding(item)).sum(-1) + self.output_bias[item]

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, V]`` of all items."""
        items = self.item_embedding.weight[: self.n_items]
        return self._encode(interaction) @ items.T + self.output_bias
