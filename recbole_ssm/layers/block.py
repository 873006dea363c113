"""What surrounds a mixer in Mamba4Rec (Liu et al. 2024, arXiv 2403.03900, section 3.3) and its descendants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.layers.state import MixerState
from recbole_ssm.layers.step import in_one_kernel, norm_fields
from recbole_ssm.ops import dropout
from recbole_ssm.ops.packing import last_of


class Recipe(NamedTuple):
    """What may differ in how a block surrounds its mixer; Mamba4Rec's way by default."""

    pre_norm: bool = False
    """A part f of a block computes ``u + f(norm(u))`` (Xiong et al. 2020, arXiv 2002.04745), not ``norm(u + f(u))``.
    The stack then ends with a norm, and does not begin with one."""
    swiglu: bool = False
    """The feed-forward part is ``W2 (SiLU(W1 u) * V u)``, without biases (Shazeer 2020, arXiv 2002.05202)."""
    gated: bool = False
    """What is added to u is multiplied by ``sigmoid(W u + b)`` first, as in LiGR (Borisyuk et al. 2025, arXiv
    2502.03417) and eSASRec."""


PUBLISHED = Recipe()
IN_KERNELS = (PUBLISHED, Recipe(pre_norm=True))
"""The recipes of which the kernels of a step and of whole histories know the formula."""


class Dropout(nn.Dropout):
    """:func:`recbole_ssm.ops.dropout` as a module; never in place."""

    def forward(self, u: Tensor) -> Tensor:
        """``[...]`` -> ``[...]``."""
        return dropout(u, self.p, self.training)

    def kernel_weights(self) -> dict[str, Any]:
        """Nothing: kernels do not drop out."""
        return {}


def joined(
    u: Tensor, y: Tensor, norm: nn.Module, gate: nn.Module | None, pre_norm: bool, residual: bool = True
) -> Tensor:
    """What a part of a block gives ``[..., d_model]``, by its input u and what it has made of it, y."""
    if gate is not None:
        y = gate(u).sigmoid() * y
    if residual:
        y = u + y
    out: Tensor = y if pre_norm else norm(y)
    return out


def outer_norms(width: int, recipe: Recipe, eps: float = 1e-12) -> tuple[nn.Module, nn.Module]:
    """What stands before and behind a stack of blocks: a LayerNorm and nothing, or nothing and a LayerNorm."""
    norm, nothing = nn.LayerNorm(width, eps=eps), nn.Identity()
    return (nothing, norm) if recipe.pre_norm else (norm, nothing)


class FeedForward(nn.Module):
    """LayerNorm(u + W2 GELU(W1 u)), or as the recipe says, with dropout after either layer; position by position.

    Args:
        d_model: width of input and output.
        d_inner: width between them.
        dropout: probability of either dropout.
        recipe: where the norm stands, and what is between the two layers.
        activation: takes the place of GELU.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int,
        dropout: float,
        recipe: Recipe = PUBLISHED,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.recipe, self.activation = recipe, activation
        self.w_1 = nn.Linear(d_model, 2 * d_inner if recipe.swiglu else d_inner, bias=not recipe.swiglu)
        self.w_2 = nn.Linear(d_inner, d_model, bias=not recipe.swiglu)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(d_model, eps=1e-12)
        self.gate = nn.Linear(d_model, d_model) if recipe.gated else None

    def forward(self, u: Tensor) -> Tensor:
        """``[..., d_model]`` -> ``[..., d_model]``."""
        hidden = self.w_1(self.norm(u) if self.recipe.pre_norm else u)
        if self.recipe.swiglu:
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = self.activation(hidden)
        y = self.dropout(self.w_2(self.dropout(hidden)))
        return joined(u, y, self.norm, self.gate, self.recipe.pre_norm)

    def kernel_weights(self) -> dict[str, Any]:
        """What the kernels of a block read of this part; nothing of one that they do not know."""
        if self.recipe not in IN_KERNELS or self.activation is not F.gelu:
            return {}
        return {
            "F": self.w_1.out_features,
            "w_1": self.w_1.weight,
            "b_1": self.w_1.bias,
            "w_2": self.w_2.weight,
            "b_2": self.w_2.bias,
            **norm_fields("last", self.norm),
        }


class Block(nn.Module):
    """Mixer, dropout, residual, LayerNorm, then the feed-forward part.

    Args:
        mixer: Mamba, Mamba2, Hydra, or a module with their ``forward`` (and ``step``).
        d_model: width of input and output.
        dropout: probability of every dropout.
        residual: whether the input is added to the mixer's output. Mamba4Rec's published code
            leaves it out where the model has one layer.
        recipe: where norms stand, and what else differs.
    """

    def __init__(
        self, mixer: nn.Module, d_model: int, dropout: float, residual: bool, recipe: Recipe = PUBLISHED
    ) -> None:
        super().__init__()
        self.mixer: Any = mixer
        self.recipe = recipe
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(d_model, eps=1e-12)
        self.feed_forward = FeedForward(d_model, 4 * d_model, dropout, recipe)
        self.gate = nn.Linear(d_model, d_model) if recipe.gated else None
        self.residual = residual

    def forward(
        self,
        u: Tensor,
        state: MixerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
        return_state: bool = True,
        gap: Tensor | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        """Whole sequences; arguments and returns as in :meth:`recbole_ssm.layers.Mamba.forward`, and the gaps before
        events for a :class:`~recbole_ssm.layers.Mamba2` that needs them.
        """
        v = self.norm(u) if self.recipe.pre_norm else u
        more: dict[str, Any] = {} if gap is None else {"gap": gap}
        y, state = self.mixer(v, state, cu_seqlens=cu_seqlens, last_only=last_only, return_state=return_state, **more)
        return self._finish(last_of(u, cu_seqlens) if last_only else u, y), state

    @in_one_kernel
    def step(self, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """One event ``[B, d_model]``, as in :meth:`recbole_ssm.layers.Mamba.step`."""
        y, state = self.mixer.step(self.norm(u_t) if self.recipe.pre_norm else u_t, state)
        return self._finish(u_t, y), state

    def _finish(self, u: Tensor, y: Tensor) -> Tensor:
        y = joined(u, self.dropout(y), self.norm, self.gate, self.recipe.pre_norm, self.residual)
        out: Tensor = self.feed_forward(y)
        return out

    def kernel_weights(self) -> dict[str, Any]:
        """What the kernels of a step and of whole histories read of this layer; nothing where its mixer has none, or
        its recipe is one that they do not know, or its state decays through gaps, which they are not told.
        """
        parts: list[dict[str, Any]] = [
            part.kernel_weights() if hasattr(part, "kernel_weights") else {} for part in (self.mixer, self.feed_forward)
        ]
        one_recipe = self.recipe == getattr(self.feed_forward, "recipe", None)
        if not all(parts) or not one_recipe or parts[0].get("gap_rate") is not None:
            return {}
        settings = {"residual": self.residual, "pre_norm": self.recipe.pre_norm}
        return {**parts[0], **parts[1], **settings, **norm_fields("norm", self.norm)}
