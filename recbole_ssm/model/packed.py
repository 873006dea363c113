"""RecBole's SequentialRecommender over packed histories: what a model inherits that can encode
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_ssm.config import Configurable
from recbole_ssm.data.loader import PackedBatch
from recbole_ssm.model.loss import NextItemLoss
from recbole_ssm.ops.packing import cu_seqlens_of


class PackedRecommender(Configurable, SequentialRecommender):
    """A model that encodes histories laid end to end; scores are dot products with the item embeddings.

    A subclass defines ``item_embedding``, :meth:`encode` and ``loss``. RecBole's rows are
    packed before anything is computed, so padding costs nothing and cannot influence a score.
    """

    item_embedding: torch.nn.Embedding
    loss: NextItemLoss
    graphed: Callable[[Tensor, Tensor], Tensor] | None = None
    """What scores in place of ``forward``: see :func:`recbole_ssm.graphs.score_by_graphs`."""

    @staticmethod
    def all_positions_refusal(config: Any) -> str | None:
        """A causal model can learn from all positions."""
        return None

    @staticmethod
    def window_and_context(max_length: int, window: int | None) -> tuple[int, int]:
        """Targets and context of a training window, where a history is too long to be one.

        For a recurrent model: the context is as long as RecBole's, and so is the window by
        default.
        """
        return window or max_length, max_length

    def encode(self, items_L: Tensor, cu_seqlens: Tensor, *, last_only: bool = False) -> Tensor:
        """Outputs for packed histories.

        Args:
            items_L: item ids of all histories, end to end ``[total]``.
            cu_seqlens: bounds of the histories ``[S + 1]``.
            last_only: give the last position of each history only.

        Returns:
            ``[total, hidden_size]``, or ``[S, hidden_size]`` with ``last_only``.
        """
        raise NotImplementedError

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Right-padded histories ``[B, L]`` and their lengths ``[B]`` -> one vector for each
        ``[B, hidden_size]``.
        """
        return self.encode(*pack(item_seq, item_seq_len), last_only=True)

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean loss over the targets of a batch: RecBole's rows, or a
        :class:`~recbole_ssm.data.loader.PackedBatch`.
        """
        if isinstance(interaction, PackedBatch):
            output = self.encode(interaction.items, interaction.cu_seqlens)[interaction.at]  # [n, hidden_size]
            target, negative = interaction.target, interaction.negative
        else:
            output = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
            target = interaction[self.POS_ITEM_ID]
            negative = interaction[self.NEG_ITEM_ID] if self.loss.loss_type == "BPR" else None
        loss: Tensor = self.loss(output, self.item_embedding.weight, target, negative)
        return loss

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of one item a row."""
        output = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return (output * self.item_embedding(interaction[self.ITEM_ID])).sum(-1)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, V]`` of all items."""
        if self.graphed is not None:
            return self.graphed(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        output, items = self.factors(interaction)
        return output @ items.T

    def factors(self, interaction: Any) -> tuple[Tensor, Tensor]:
        """What the scores are products of: vectors of the rows ``[B, hidden_size]`` and of all items
        ``[V, hidden_size]``. Evaluation counts ranks by them, unless a subclass has a ``full_sort_predict`` of its own.
        """
        output = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return output, self.item_embedding.weight

    def fixed_shape_scores(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Scores ``[B, V]`` of all items for histories ``[B, L]``, in shapes that do not depend on their lengths.

        A CUDA graph demands such shapes. Padding is computed too, which pays for few users.
        """
        output = self.encode(*split_padding(item_seq, item_seq_len), last_only=True)[::2]
        return output @ self.item_embedding.weight.T


def pack(item_seq: Tensor, item_seq_len: Tensor) -> tuple[Tensor, Tensor]:
    """Right-padded ids ``[B, L]`` and lengths ``[B]`` -> packed ids ``[total]`` and their
    bounds ``[B + 1]``.
    """
    if len(item_seq) == 1 and item_seq.is_cpu and not torch.compiler.is_compiling():
        # The same without four operations, which take longer than the kernels of a short history.
        length = int(item_seq_len[0])
        return item_seq[0, :length], torch.tensor([0, length])
    real = torch.arange(item_seq.shape[1], device=item_seq.device) < item_seq_len[:, None]  # [B, L]
    return item_seq[real], cu_seqlens_of(item_seq_len)


def split_padding(item_seq: Tensor, item_seq_len: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`pack`, in shapes that no length changes: ids ``[B L]`` and bounds ``[2 B + 1]``.

    Row b is sequence 2 b, and its padding, which may be empty, is sequence 2 b + 1.
    """
    B, L = item_seq.shape
    begin = torch.arange(B, device=item_seq.device) * L
    ends = torch.stack([begin + item_seq_len, begin + L], 1)  # [B, 2]
    return item_seq.flatten(), torch.nn.functional.pad(ends.flatten(), (1, 0))
