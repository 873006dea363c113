"""
SASRec
################################################
Reference:
    Wang-Cheng Kang and Julian McAuley. "Self-Attentive Sequential Recommendation." ICDM 2018,
    arXiv 1808.09781; in RecBole's form (Transformer layers of BERT, post-norm, GELU).
"""

from __future__ import annotations

from typing import Any

from recbole.model.layers import TransformerEncoder
from torch import Tensor, nn

from recbole_ssm.layers import Clock, Dropout, FeedForward, Recipe, joined, outer_norms
from recbole_ssm.model.loss import NextItemLoss
from recbole_ssm.model.packed import PackedRecommender, recipe_of
from recbole_ssm.ops import packed_attention
from recbole_ssm.ops.attention import reads_no_length
from recbole_ssm.ops.packing import last_of, positions_of


class SASRec(PackedRecommender):
    """SASRec as RecBole has it, over packed histories: the baseline in the same terms as the state-space models.

    Names, sizes and starting values of the weights are RecBole's, and so are the scores (to
    rounding). Ours are three things: no padding is computed; where only the last position is
    read, the last layer computes no other; and the model can be trained on all positions at
    once, as in the paper and not in RecBole. Other recipes are open to it: with norms that come
    first, SwiGLU and gates it has the layers of eSASRec (Tikhonovich et al., RecSys 2025).
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)

        # load parameters info
        self.hidden_size = config["hidden_size"]
        self.n_heads = config["n_heads"]
        self.attn_dropout_prob = config["attn_dropout_prob"]
        self.initializer_range = config["initializer_range"]

        # define layers and loss
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(self.max_seq_length, self.hidden_size)
        self.trm_encoder = TransformerEncoder(
            n_layers=config["n_layers"],
            n_heads=self.n_heads,
            hidden_size=self.hidden_size,
            inner_size=config["inner_size"],
            hidden_dropout_prob=config["hidden_dropout_prob"],
            attn_dropout_prob=self.attn_dropout_prob,
            hidden_act=config["hidden_act"],
            layer_norm_eps=config["layer_norm_eps"],
        )
        self.recipe = recipe_of(config)
        self.LayerNorm, self.last_norm = outer_norms(self.hidden_size, self.recipe, eps=config["layer_norm_eps"])
        self.dropout = Dropout(config["hidden_dropout_prob"])
        for module in list(self.trm_encoder.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Dropout:
                    setattr(module, name, Dropout(child.p))
        for layer in self.trm_encoder.layer:
            layer.multi_head_attention.gate = None
            if self.recipe != Recipe():
                # RecBole's is the default's, whose weights keep their names.
                self._follow_recipe(layer, config)
        self.loss = NextItemLoss(config, dataset, self.n_items)
        self.read_times(config, dataset, self.hidden_size)

        # parameters initialization
        self.apply(self._init_weights)

    def _follow_recipe(self, layer: Any, config: Any) -> None:
        """Replace what surrounds attention in one of RecBole's layers."""
        width, dropout = self.hidden_size, config["hidden_dropout_prob"]
        activation = layer.feed_forward.intermediate_act_fn
        layer.feed_forward = FeedForward(width, config["inner_size"], dropout, self.recipe, activation)
        if self.recipe.gated:
            layer.multi_head_attention.gate = nn.Linear(width, width)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def fixed_shapes(self) -> bool:
        """As :attr:`PackedRecommender.fixed_shapes`: where attention pads nothing."""
        return reads_no_length(self._heads(self.item_embedding.weight))

    @staticmethod
    def window_and_context(max_length: int, window: int | None) -> tuple[int, int]:
        """Positions are learned up to ``max_length``, which window and context share; half each
        by default.
        """
        window = min(window or (max_length + 1) // 2, max_length)
        return window, max_length - window + 1

    def encode(
        self, items_L: Tensor, cu_seqlens: Tensor, clock: Clock | None = None, *, last_only: bool = False
    ) -> Tensor:
        """As :meth:`PackedRecommender.encode`; no history is longer than
        ``MAX_ITEM_LIST_LENGTH``.
        """
        positions = positions_of(cu_seqlens, len(items_L))
        x = self.embed(items_L, clock) + self.position_embedding(positions)
        return self._layers(x, cu_seqlens, last_only)

    def encode_padded(self, item_seq: Tensor, clock: Clock | None = None) -> Tensor:
        """As :meth:`PackedRecommender.encode_padded`."""
        x = self.embed(item_seq, clock) + self.position_embedding.weight[: item_seq.shape[1]]
        return self._layers(x, None, last_only=False)

    def _layers(self, x: Tensor, cu_seqlens: Tensor | None, last_only: bool) -> Tensor:
        x = self.dropout(self.LayerNorm(x))  # [total, hidden_size]
        layers = self.trm_encoder.layer
        dropout = self.attn_dropout_prob if self.training else 0.0
        for number, layer in enumerate(layers):
            at_last = last_only and number == len(layers) - 1
            attention = layer.multi_head_attention
            u = attention.LayerNorm(x) if self.recipe.pre_norm else x
            # The positions that are needed from here on: [S or total, hidden_size].
            x, asking = (last_of(x[None], cu_seqlens), last_of(u[None], cu_seqlens)) if at_last else (x, u)
            q, k, v = (self._heads(t) for t in (attention.query(asking), attention.key(u), attention.value(u)))
            context = packed_attention(q, k, v, cu_seqlens, self.max_seq_length, last_only=at_last, dropout=dropout)
            y = attention.out_dropout(attention.dense(context.flatten(-2)))
            y = joined(x, y, attention.LayerNorm, attention.gate, self.recipe.pre_norm)
            x = layer.feed_forward(y)
        return self.last_norm(x)

    def _heads(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` -> ``[..., n_heads, head_dim]``."""
        return x.unflatten(-1, (self.n_heads, -1))
