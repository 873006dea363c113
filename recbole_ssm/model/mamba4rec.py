"""
Mamba4Rec
################################################
Reference:
    Chengkai Liu et al. "Mamba4Rec: Towards Efficient Sequential Recommendation with Selective
    State Space Models." arXiv 2403.03900, 2024. Section 3, figure 2, and the published code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from recbole_ssm.layers import Block, Clock, Dropout, Mamba, in_one_call, outer_norms
from recbole_ssm.model.loss import NextItemLoss
from recbole_ssm.model.ssm import SSMRecommender


class Mamba4Rec(SSMRecommender):
    """Mamba4Rec encodes a history with Mamba's selective scan: one state of N numbers for each channel.

    A channel's inputs x become outputs y by ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`` and
    ``y_t = C_t h_t + D x_t``, where dt, B and C depend on the inputs (Gu and Dao, arXiv
    2312.00752, algorithm 2): :mod:`recbole_ssm.layers.mamba`.

    The vector of a history is read out where it ends (``forward``), and an item's score is the
    dot product of that vector with the item's embedding (``full_sort_predict``); the loss is a
    softmax over these scores.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)

        # load parameters info
        sizes = {key: config[key] for key in ("d_state", "d_conv", "expand", "dt_init")}

        # define layers and loss
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size, padding_idx=0)
        self.dropout = Dropout(self.dropout_prob)
        self.norm, self.last_norm = outer_norms(self.hidden_size, self.recipe)
        self.blocks = nn.ModuleList(
            Block(Mamba(self.hidden_size, **sizes), self.hidden_size, self.dropout_prob, self.residual, self.recipe)
            for _ in range(self.num_layers)
        )
        self.loss = NextItemLoss(config, dataset, self.n_items)
        self.read_times(config, dataset, self.hidden_size)

        # parameters initialization
        self.apply(self._init_weights)
        self._reset_dt()

    @in_one_call
    def encode(
        self, items_L: Tensor, cu_seqlens: Tensor, clock: Clock | None = None, *, last_only: bool = False
    ) -> Tensor:
        """As :meth:`PackedRecommender.encode`."""
        # The embedding layer. The scan knows the order of events, so no position is added.
        u = self.norm(self.dropout(self.embed(items_L, clock)))[None]  # [1, total, hidden_size]
        # The Mamba layers: y = LayerNorm(u + Dropout(Mamba(u))), then LayerNorm(y + FFN(y));
        # other recipes (pre-norm, SwiGLU, gates) are in recbole_ssm.layers.block.
        # The published code does not add u where there is one layer; here ``residual`` decides.
        for number, block in enumerate(self.blocks, 1):
            at_last = last_only and number == len(self.blocks)
            u, _ = block(u, cu_seqlens=cu_seqlens, last_only=at_last, return_state=False)
        return self.last_norm(u if last_only else u[0])
