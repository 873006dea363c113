"""
Hydra4Rec
################################################
Reference:
    arXiv 2408.05606, 2024, names the model, and no definition beyond the name is public. Ours
    is Mamba4Rec (Liu et al., arXiv 2403.03900) with the mixer of Hydra (Hwang et al., arXiv
    2407.09941).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from logging import getLogger
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.data.gaps import reads_times
from recbole_ssm.data.masking import MASK
from recbole_ssm.errors import UserError
from recbole_ssm.layers import Block, Clock, Dropout, Hydra, in_one_call, outer_norms
from recbole_ssm.model.loss import NextItemLoss
from recbole_ssm.model.ssm import SSMRecommender


class Hydra4Rec(SSMRecommender):
    """Hydra4Rec encodes a history with Hydra's quasiseparable mixer: every event sees those before and after it.

    The outputs of a head are ``y = M x``. Below the diagonal the matrix M is that of Mamba-2's
    scan over the history, above it that of such a scan from the end, and on it a number for
    each event: :mod:`recbole_ssm.layers.hydra`. Readout, scores and loss are Mamba4Rec's.

    It learns from prefixes, or from whole histories of which some items are hidden (``train_mode:
    masked``), as BERT4Rec does. Then the next item is asked for as a hidden one behind the history,
    because hidden positions are all that it has learned to fill. :mod:`recbole_ssm.data.masking`
    hides them behind the id of the padding, whose embedding is learned here.

    The last position has no future. So a single layer that is read there never uses its
    backward half; two layers, or the readout ``mean``, make the model bidirectional, and two
    layers are the default.
    """

    hides_items = True

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
        self.masked = config["train_mode"] == "masked"
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size, padding_idx=None if self.masked else MASK)
        self.dropout = Dropout(self.dropout_prob)
        self.norm, self.last_norm = outer_norms(self.hidden_size, self.recipe)
        self.blocks = nn.ModuleList(
            Block(Hydra(self.hidden_size, **sizes), self.hidden_size, self.dropout_prob, self.residual, self.recipe)
            for _ in range(self.num_layers)
        )
        self.loss = NextItemLoss(config, dataset, self.n_items)
        self.read_times(config, dataset, self.hidden_size)

        # parameters initialization
        self.apply(self._init_weights)
        self._reset_dt()
        if self.masked:
            nn.init.normal_(self.item_embedding.weight[MASK].detach(), std=self.initializer_range)

    @staticmethod
    def check_options(options: Mapping[str, Any], find_model: Callable[[str], type]) -> None:
        """Refuse what hidden items do not go with."""
        SSMRecommender.check_options(options, find_model)
        if options["train_mode"] == "masked" and options["readout"] != "last":
            raise UserError("readout: mean does not read where an item is hidden; with train_mode: masked take last")
        if options["train_mode"] == "masked" and reads_times(options.get("time")):
            raise UserError("time: the times of a hidden item would tell of it; with train_mode: masked take none")

    @staticmethod
    def all_positions_refusal(config: Any) -> str | None:
        """A bidirectional model would see its targets."""
        return "Hydra4Rec is bidirectional: within a whole history every position sees the target that it must predict"

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, clock: Clock | None = None) -> Tensor:
        """As :meth:`SSMRecommender.forward`."""
        return super().forward(*self._asked(item_seq, item_seq_len), clock)

    def fixed_shape_scores(self, item_seq: Tensor, item_seq_len: Tensor, clock: Clock | None = None) -> Tensor:
        """As :meth:`PackedRecommender.fixed_shape_scores`."""
        return super().fixed_shape_scores(*self._asked(item_seq, item_seq_len), clock)

    def forward_padded(self, item_seq: Tensor, item_seq_len: Tensor, clock: Clock | None = None) -> Tensor:
        """As :meth:`PackedRecommender.forward_padded`."""
        return super().forward_padded(*self._asked(item_seq, item_seq_len), clock)

    def _asked(self, item_seq: Tensor, item_seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """Histories ``[B, L]``, with a hidden item behind each if the model has learned to fill such."""
        if not self.masked:
            return item_seq, item_seq_len
        longer = F.pad(item_seq, (0, 1)).scatter(1, item_seq_len[:, None], MASK)
        return longer, item_seq_len + 1

    @in_one_call
    def encode(
        self, items_L: Tensor, cu_seqlens: Tensor, clock: Clock | None = None, *, last_only: bool = False
    ) -> Tensor:
        """As :meth:`PackedRecommender.encode`."""
        # The embedding layer. The mixer knows the order of events, so no position is added.
        u = self.norm(self.dropout(self.embed(items_L, clock)))[None]  # [1, total, hidden_size]
        # The blocks: y = LayerNorm(u + Dropout(Hydra(u))), then LayerNorm(y + FFN(y)). The key
        # ``residual`` decides whether u is added; other recipes are in recbole_ssm.layers.block.
        for number, block in enumerate(self.blocks, 1):
            at_last = last_only and number == len(self.blocks)
            u, _ = block(u, cu_seqlens=cu_seqlens, last_only=at_last, return_state=False)
        return self.last_norm(u if last_only else u[0])
