"""
GRU4Rec
################################################
Reference:
    Yong Kiam Tan et al. "Improved Recurrent Neural Networks for Session-based Recommendations."
    DLRS 2016, arXiv 1606.08117; in RecBole's form (a GRU without biases, then a linear layer).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from recbole_ssm.layers import Clock, Dropout
from recbole_ssm.model.loss import NextItemLoss
from recbole_ssm.model.packed import PackedRecommender
from recbole_ssm.ops.packing import positions_of


class GRU4Rec(PackedRecommender):
    """GRU4Rec as RecBole has it, over packed histories: the recurrent baseline in the same terms as the others.

    Names, sizes and starting values of the weights are RecBole's, and so are the scores (to
    rounding); what is ours is that no padding is computed, and that it can be trained on all
    positions at once.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)

        # load parameters info
        self.embedding_size = config["embedding_size"]
        self.hidden_size = config["hidden_size"]
        self.num_layers = config["num_layers"]
        self.dropout_prob = config["dropout_prob"]

        # define layers and loss
        self.item_embedding = nn.Embedding(self.n_items, self.embedding_size, padding_idx=0)
        self.emb_dropout = Dropout(self.dropout_prob)
        self.gru_layers = nn.GRU(self.embedding_size, self.hidden_size, self.num_layers, bias=False)
        self.dense = nn.Linear(self.hidden_size, self.embedding_size)
        self.loss = NextItemLoss(config, dataset, self.n_items)
        self.read_times(config, dataset, self.embedding_size)

        # parameters initialization
        self.apply(self._init_weights)

    @property
    def fixed_shapes(self) -> bool:
        """PyTorch's recurrent layers take the numbers of histories at each position on the CPU."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.GRU):
            # RecBole does so for the first layer only.
            for name in ("weight_hh_l0", "weight_ih_l0"):
                nn.init.xavier_uniform_(getattr(module, name))

    def encode(
        self, items_L: Tensor, cu_seqlens: Tensor, clock: Clock | None = None, *, last_only: bool = False
    ) -> Tensor:
        """As :meth:`PackedRecommender.encode`; with ``last_only``, no history is empty. Vectors have
        ``embedding_size`` numbers.
        """
        x = self.emb_dropout(self.embed(items_L, clock))  # [total, embedding_size]
        # PyTorch's recurrent layers want all first events, then all second ones, and so on, the longest history first.
        # PyTorch's own pack_sequence copies all of the gradient once a history.
        lengths, positions = cu_seqlens.diff(), positions_of(cu_seqlens)
        by_length = lengths.argsort(descending=True, stable=True)
        rank = by_length.argsort()
        order = (positions * len(lengths) + rank.repeat_interleave(lengths)).argsort()
        histories = PackedSequence(x.index_select(0, order), positions.bincount().cpu())
        # last: [num_layers, histories that are not empty, hidden_size], the longest first
        outputs, last = self.gru_layers(histories)
        vectors: Tensor = self.dense(last[-1, rank] if last_only else outputs.data.index_select(0, order.argsort()))
        return vectors

    def encode_padded(self, item_seq: Tensor, clock: Clock | None = None) -> Tensor:
        """As :meth:`PackedRecommender.encode_padded`."""
        outputs, _ = self.gru_layers(self.embed(item_seq, clock).transpose(0, 1))  # [L, B, hidden_size]
        vectors: Tensor = self.dense(outputs.transpose(0, 1))
        return vectors
