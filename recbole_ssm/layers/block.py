"""What surrounds a mixer in Mamba4Rec (Liu et al. 2024, arXiv 2403.03900, section 3.3) and its descendants."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from recbole_ssm.layers.state import MixerState
from recbole_ssm.layers.step import in_one_kernel, norm_fields
from recbole_ssm.ops import dropout
from recbole_ssm.ops.packing import last_of


class Dropout(nn.Dropout):
    """:func:`recbole_ssm.ops.dropout` as a module; never in place."""

    def forward(self, u: Tensor) -> Tensor:
        """``[...]`` -> ``[...]``."""
        return dropout(u, self.p, self.training)


class FeedForward(nn.Module):
    """LayerNorm(u + W2 GELU(W1 u)) with dropout after either layer; position by position.

    Args:
        d_model: width of input and output.
        d_inner: width between them.
        dropout: probability of either dropout.
    """

    def __init__(self, d_model: int, d_inner: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(d_model, d_inner)
        self.w_2 = nn.Linear(d_inner, d_model)
        self.activation = nn.GELU()
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(d_model, eps=1e-12)

    def forward(self, u: Tensor) -> Tensor:
        """``[..., d_model]`` -> ``[..., d_model]``."""
        hidden = self.dropout(self.activation(self.w_1(u)))
        y: Tensor = self.norm(u + self.dropout(self.w_2(hidden)))
        return y


class Block(nn.Module):
    """Mixer, dropout, residual, LayerNorm, then the feed-forward part.

    Args:
        mixer: Mamba, Mamba2, Hydra, or a module with their ``forward`` (and ``step``).
        d_model: width of input and output.
        dropout: probability of every dropout.
        residual: whether the input is added to the mixer's output. Mamba4Rec's published code
            leaves it out where the model has one layer.
    """

    def __init__(self, mixer: nn.Module, d_model: int, dropout: float, residual: bool) -> None:
        super().__init__()
        self.mixer: Any = mixer
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(d_model, eps=1e-12)
        self.feed_forward = FeedForward(d_model, 4 * d_model, dropout)
        self.residual = residual

    def forward(
        self,
        u: Tensor,
        state: MixerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
        return_state: bool = True,
    ) -> tuple[Tensor, MixerState | None]:
        """Whole sequences; arguments and returns as in :meth:`recbole_ssm.layers.Mamba.forward`."""
        y, state = self.mixer(u, state, cu_seqlens=cu_seqlens, last_only=last_only, return_state=return_state)
        return self._finish(last_of(u, cu_seqlens) if last_only else u, y), state

    @in_one_kernel
    def step(self, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """One event ``[B, d_model]``, as in :meth:`recbole_ssm.layers.Mamba.step`."""
        y, state = self.mixer.step(u_t, state)
        return self._finish(u_t, y), state

    def _finish(self, u: Tensor, y: Tensor) -> Tensor:
        y = self.dropout(y)
        y = self.norm(u + y if self.residual else y)
        out: Tensor = self.feed_forward(y)
        return out

    def kernel_weights(self) -> dict[str, Any]:
        """What the kernels of a step and of whole histories read of this layer; nothing where its mixer has none."""
        mixer = self.mixer.kernel_weights() if hasattr(self.mixer, "kernel_weights") else {}
        if not mixer:
            return {}
        w_1, w_2 = self.feed_forward.w_1, self.feed_forward.w_2
        return {
            **mixer,
            "F": w_1.out_features,
            "residual": self.residual,
            "w_1": w_1.weight,
            "b_1": w_1.bias,
            "w_2": w_2.weight,
            "b_2": w_2.bias,
            **norm_fields("norm", self.norm),
            **norm_fields("last", self.feed_forward.norm),
        }
