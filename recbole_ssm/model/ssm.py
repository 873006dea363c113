"""What Mamba4Rec, 2Mamba4Rec and Hydra4Rec share: the readout, and events that come one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recbole_ssm.layers import Clock, Dropout, MixerState
from recbole_ssm.layers.weights import in_kernels_too
from recbole_ssm.model.packed import PackedRecommender, pack, recipe_of


class SSMRecommender(PackedRecommender):
    """A recommender of blocks around state-space mixers.

    A subclass defines the layers that are declared here, the ``loss``, and ``encode``. Where
    the readout is the last position, the last block computes nothing else; this is exact.
    """

    dropout: Dropout
    norm: nn.Module
    """Between the embeddings and the first block; nothing where the norms of blocks come first."""
    last_norm: nn.Module
    """Behind the last block; nothing where the norms of blocks come last."""
    blocks: Any

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)

        # load parameters info
        self.hidden_size = config["hidden_size"]
        self.num_layers = config["num_layers"]
        self.dropout_prob = config["dropout_prob"]
        self.initializer_range = config["initializer_range"]
        self.readout = config["readout"]
        self.recipe = recipe_of(config)
        # The rule of Mamba4Rec's published code: one layer has no residual. Without one, a norm that comes first would
        # leave nothing of the input.
        several = self.num_layers > 1 or self.recipe.pre_norm
        self.residual = several if config["residual"] == "auto" else config["residual"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            # The row of the padding.
            nn.init.zeros_(module.weight[0].detach())

    def _reset_dt(self) -> None:
        """Start the step sizes as the key ``dt_init`` says, after all other weights."""
        for block in self.blocks:
            block.mixer.reset_dt()

    @staticmethod
    def all_positions_refusal(config: Any) -> str | None:
        """A mean over the history is not what a position within it gives."""
        return "readout: mean takes a history as one" if config["readout"] == "mean" else None

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, clock: Clock | None = None) -> Tensor:
        """As :meth:`PackedRecommender.forward`."""
        if self.readout == "last":
            return super().forward(item_seq, item_seq_len, clock)
        outputs = self.encode(*pack(item_seq, item_seq_len, clock))
        row = torch.arange(len(item_seq), device=item_seq.device).repeat_interleave(item_seq_len)
        sums = outputs.new_zeros(len(item_seq), self.hidden_size).index_add(0, row, outputs)
        means = sums / item_seq_len.clamp(min=1)[:, None]
        return self.read_out(means, clock and clock.newest(item_seq_len))

    def gap_of(self, clock: Clock | None) -> Tensor | None:
        """The gap before each event, in the clock's shape, if the states of blocks decay through it."""
        if self.time_encoding is None or not self.time_encoding.gap_decays or clock is None:
            return None
        return self.time_encoding.elapsed(clock)

    def encode_padded(self, item_seq: Tensor, clock: Clock | None = None) -> Tensor:
        """As :meth:`PackedRecommender.encode_padded`."""
        u, gap = self.norm(self.dropout(self.embed(item_seq, clock))), self.gap_of(clock)
        for block in self.blocks:
            u, _ = block(u, return_state=False, gap=gap)
        out: Tensor = self.last_norm(u)
        return out

    def read_padded(self, output: Tensor, real: Tensor) -> Tensor:
        """As :meth:`PackedRecommender.read_padded`; the mean over events with ``readout: mean``."""
        if self.readout == "last":
            return super().read_padded(output, real)
        return torch.where(real[..., None], output, 0.0).sum(1) / real.sum(1).clamp(min=1)[:, None]

    # --- events one by one ---

    @property
    def carries_state(self) -> bool:
        """Whether events can be taken one by one: :meth:`step`, :meth:`read` and
        :meth:`alloc_state` work.
        """
        return self.readout == "last" and all(hasattr(block.mixer, "alloc_state") for block in self.blocks)

    def alloc_state(self, batch: int) -> list[MixerState]:
        """The state of ``batch`` users before their first event, one entry a block."""
        return [block.mixer.alloc_state(batch) for block in self.blocks]

    @in_kernels_too
    def step(
        self, item_B: Tensor, state: list[MixerState], clock: Clock | None = None
    ) -> tuple[Tensor, list[MixerState]]:
        """One more event of each user: item ids ``[B]`` and, where the model reads times, their clock ``[B]`` ->
        vectors ``[B, hidden_size]`` and the next state.

        Equal to :meth:`encode` over the whole history, for causal mixers and the readout ``last``.
        """
        u, gap = self.norm(self.dropout(self.embed(item_B, clock))), self.gap_of(clock)
        after = []
        for block, before in zip(self.blocks, state):
            if gap is not None:
                before = block.mixer.after_gap(before, gap)
            u, new = block.step(u, before)
            after.append(new)
        return self.last_norm(u), after

    def read(self, items_L: Tensor, clock: Clock | None = None) -> tuple[Tensor, list[MixerState]]:
        """One history of any length at once: item ids ``[L]`` and their clock ``[L]`` -> a vector
        ``[1, hidden_size]`` and what steps leave.
        """
        u, gap = self.norm(self.dropout(self.embed(items_L, clock)))[None], self.gap_of(clock)
        states = []
        for block in self.blocks:
            u, state = block(u, gap=gap)
            states.append(state)
        return self.last_norm(u[:, -1]), states
