"""
Hydra4Rec
################################################
Reference:
    arXiv 2408.05606, 2024, names the model, and no definition beyond the name is public. Ours
    is Mamba4Rec (Liu et al., arXiv 2403.03900) with the mixer of Hydra (Hwang et al., arXiv
    2407.09941).
"""

from __future__ import annotations

from logging import getLogger
from typing import Any

from torch import Tensor, nn

from recbole_ssm.layers import Block, Clock, Dropout, Hydra, in_one_call
from recbole_ssm.model.loss import NextItemLoss
from recbole_ssm.model.ssm import SSMRecommender


class Hydra4Rec(SSMRecommender):
    """Hydra4Rec encodes a history with Hydra's quasiseparable mixer: every event sees those before and after it.

    The outputs of a head are ``y = M x``. Below the diagonal the matrix M is that of Mamba-2's
    scan over the history, above it that of such a scan from the end, and on it a number for
    each event: :mod:`recbole_ssm.layers.hydra`. Readout, scores and loss are Mamba4Rec's.

    The last position has no future. So a single layer that is read there never uses its
    backward half; two layers, or the readout ``mean``, make the model bidirectional, and two
    layers are the default.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)

        # load parameters info
        keys = ("d_state", "d_conv", "expand", "head_dim", "n_groups", "dt_init")
        sizes = {key: config[key] for key in keys}
        if self.num_layers == 1 and self.readout == "last":
            getLogger().warning(
                "Hydra4Rec with num_layers: 1 and readout: last never uses its backward half; "
                "for a bidirectional model take num_layers: 2 or readout: mean"
            )

        # define layers and loss
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size, padding_idx=0)
        self.dropout = Dropout(self.dropout_prob)
        self.norm = nn.LayerNorm(self.hidden_size, eps=1e-12)
        self.blocks = nn.ModuleList(
            Block(Hydra(self.hidden_size, **sizes), self.hidden_size, self.dropout_prob, self.residual)
            for _ in range(self.num_layers)
        )
        self.loss = NextItemLoss(config, dataset, self.n_items)
        self.read_times(config, dataset, self.hidden_size)

        # parameters initialization
        self.apply(self._init_weights)
        self._reset_dt()

    @staticmethod
    def all_positions_refusal(config: Any) -> str | None:
        """A bidirectional model would see its targets."""
        return "Hydra4Rec is bidirectional: within a whole history every position sees the target that it must predict"

    @in_one_call
    def encode(
        self, items_L: Tensor, cu_seqlens: Tensor, clock: Clock | None = None, *, last_only: bool = False
    ) -> Tensor:
        """As :meth:`PackedRecommender.encode`."""
        # The embedding layer. The mixer knows the order of events, so no position is added.
        u = self.norm(self.dropout(self.embed(items_L, clock)))[None]  # [1, total, hidden_size]
        # The blocks: y = LayerNorm(u + Dropout(Hydra(u))), then LayerNorm(y + FFN(y)). The key
        # ``residual`` decides whether u is added.
        for number, block in enumerate(self.blocks, 1):
            at_last = last_only and number == self.num_layers
            u, _ = block(u, cu_seqlens=cu_seqlens, last_only=at_last, return_state=False)
        return u if last_only else u[0]
