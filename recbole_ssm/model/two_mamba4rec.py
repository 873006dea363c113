"""
2Mamba4Rec
################################################
Reference:
    arXiv 2408.05606, 2024, names the model, and no definition beyond the name is public. Ours
    is Mamba4Rec (Liu et al., arXiv 2403.03900) with the mixer of Mamba-2 (Dao and Gu, arXiv
    2405.21060).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from recbole_ssm.layers import Block, Clock, Dropout, Mamba2, in_one_call, outer_norms
from recbole_ssm.model.loss import NextItemLoss
from recbole_ssm.model.ssm import SSMRecommender


class TwoMamba4Rec(SSMRecommender):
    """2Mamba4Rec encodes a history with Mamba-2's SSD: a larger state, one decay a head, matrix products throughout.

    A head's inputs x become outputs y by ``h_t = exp(dt_t a) h_{t-1} + dt_t B_t x_t`` and
    ``y_t = C_t h_t + D x_t``, where a is a number, and dt, B and C depend on the inputs:
    :mod:`recbole_ssm.layers.mamba2`. Readout, scores and loss are Mamba4Rec's.
    """

    model_name = "2Mamba4Rec"

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)

        # load parameters info
        keys = ("d_state", "d_conv", "expand", "head_dim", "n_groups", "dt_init")
        sizes = {key: config[key] for key in keys}
        sizes["joint_norm"] = bool(config["joint_norm"])
        sizes["gap_decays"] = config["gap_enters"] == "step"

        # define layers and loss
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size, padding_idx=0)
        self.dropout = Dropout(self.dropout_prob)
        self.norm, self.last_norm = outer_norms(self.hidden_size, self.recipe)
        self.blocks = nn.ModuleList(
            Block(Mamba2(self.hidden_size, **sizes), self.hidden_size, self.dropout_prob, self.residual, self.recipe)
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
        gap = self.gap_of(clock)
        # The blocks: y = LayerNorm(u + Dropout(Mamba2(u))), then LayerNorm(y + FFN(y)). The key
        # ``residual`` decides whether u is added; other recipes are in recbole_ssm.layers.block.
        for number, block in enumerate(self.blocks, 1):
            at_last = last_only and number == len(self.blocks)
            u, _ = block(u, cu_seqlens=cu_seqlens, last_only=at_last, return_state=False, gap=gap)
        return self.last_norm(u if last_only else u[0])
