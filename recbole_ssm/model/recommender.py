"""
SSMRecommender
################################################
Everything that Mamba4Rec, 2Mamba4Rec and Hydra4Rec share; they differ in their mixer alone.

Reference:
    Chengkai Liu et al. "Mamba4Rec: Towards Efficient Sequential Recommendation with Selective State Space Models."
    arXiv 2403.03900, 2024. Section 3 and figure 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recbole_ssm.layers import Block, Dropout, MixerState
from recbole_ssm.model.loss import NextItemLoss
from recbole_ssm.model.packed import PackedRecommender, pack


class SSMRecommender(PackedRecommender):
    """Item embedding, blocks of a state-space mixer, readout, dot product with the item embeddings.

    Where the readout is the last position, the last block computes nothing else; this is exact.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)

        # load parameters info
        self.hidden_size = config["hidden_size"]
        self.num_layers = config["num_layers"]
        self.dropout_prob = config["dropout_prob"]
        self.initializer_range = config["initializer_range"]
        self.readout = config["readout"]
        residual = config["residual"]
        if residual == "auto":  # Mamba4Rec's published rule
            residual = self.num_layers > 1

        # define layers and loss
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size, padding_idx=0)
        self.dropout = Dropout(self.dropout_prob)
        self.norm = nn.LayerNorm(self.hidden_size, eps=1e-12)
        blocks = [
            Block(self.build_mixer(config), self.hidden_size, self.dropout_prob, residual)
            for _ in range(self.num_layers)
        ]
        self.blocks: Any = nn.ModuleList(blocks)
        self.loss = NextItemLoss(config, dataset, self.n_items)

        # parameters initialization
        self.apply(self._init_weights)
        for block in blocks:
            block.mixer.reset_dt()

    def build_mixer(self, config: Any) -> nn.Module:
        """The mixer of one block; what a model defines."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.zeros_(module.weight[0].detach())  # the padding row

    def embed(self, items: Tensor) -> Tensor:
        """Item ids ``[...]`` -> inputs of the first block ``[..., hidden_size]``."""
        embedded: Tensor = self.norm(self.dropout(self.item_embedding(items)))
        return embedded

    @staticmethod
    def all_positions_refusal(config: Any) -> str | None:
        """A mean over the history is not what a position within it gives."""
        return "readout: mean takes a history as one" if config["readout"] == "mean" else None

    def encode(self, items_L: Tensor, cu_seqlens: Tensor, *, last_only: bool = False) -> Tensor:
        """As :meth:`PackedRecommender.encode`."""
        u = self.embed(items_L)[None]  # [1, total, hidden_size]
        for block in self.blocks[:-1]:
            u, _ = block(u, cu_seqlens=cu_seqlens, return_state=False)
        u, _ = self.blocks[-1](u, cu_seqlens=cu_seqlens, last_only=last_only, return_state=False)
        return u if last_only else u[0]

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Right-padded histories ``[B, L]`` and their lengths ``[B]`` -> one vector for each ``[B, hidden_size]``."""
        if self.readout == "last":
            return super().forward(item_seq, item_seq_len)
        outputs = self.encode(*pack(item_seq, item_seq_len))
        row = torch.arange(len(item_seq), device=item_seq.device).repeat_interleave(item_seq_len)
        sums = outputs.new_zeros(len(item_seq), self.hidden_size).index_add(0, row, outputs)
        return sums / item_seq_len.clamp(min=1)[:, None]

    @property
    def carries_state(self) -> bool:
        """Whether events can be taken one by one: :meth:`step`, :meth:`read` and :meth:`alloc_state` work."""
        return self.readout == "last" and all(hasattr(block.mixer, "alloc_state") for block in self.blocks)

    def alloc_state(self, batch: int) -> list[MixerState]:
        """The state of ``batch`` users before their first event, one entry a block."""
        return [block.mixer.alloc_state(batch) for block in self.blocks]

    def step(self, item_B: Tensor, state: list[MixerState]) -> tuple[Tensor, list[MixerState]]:
        """One more event of each user: item ids ``[B]`` -> vectors ``[B, hidden_size]`` and the next state.

        Equal to :meth:`forward` over the whole history, for causal mixers and the readout ``last``.
        """
        u = self.embed(item_B)
        after = []
        for block, before in zip(self.blocks, state):
            u, new = block.step(u, before)
            after.append(new)
        return u, after

    def read(self, items_L: Tensor) -> tuple[Tensor, list[MixerState]]:
        """One history of any length at once: item ids ``[L]`` -> a vector ``[1, hidden_size]`` and what steps leave."""
        u = self.embed(items_L)[None]
        states = []
        for block in self.blocks:
            u, state = block(u)
            states.append(state)
        return u[:, -1], states
