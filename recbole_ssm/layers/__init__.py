"""Modules with ``forward`` over whole sequences and ``step`` over one event, side by side: one formula, two ways.

Dimension letters are those of :mod:`recbole_ssm.ops`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from recbole_ssm.layers.block import IN_KERNELS, Block, Dropout, FeedForward, Recipe, joined, outer_norms
from recbole_ssm.layers.history import in_one_call
from recbole_ssm.layers.hydra import Hydra
from recbole_ssm.layers.mamba import Mamba
from recbole_ssm.layers.mamba2 import Mamba2
from recbole_ssm.layers.state import MixerState
from recbole_ssm.layers.time import Clock, TimeEncoding
from recbole_ssm.ops import selftest

__all__ = [
    "Block",
    "Clock",
    "Dropout",
    "FeedForward",
    "Hydra",
    "Mamba",
    "Mamba2",
    "MixerState",
    "Recipe",
    "TimeEncoding",
    "in_one_call",
    "joined",
    "outer_norms",
]


def _example_of_a_step(device: torch.device, batch: int) -> selftest.Example:
    """One event through blocks of both causal mixers, with norms behind and before their parts; the outputs and the
    states after it are joined in one row.

    The kernel of a step has no gradient, so the gradient of this row is zero.
    """
    mixers = Mamba(16, 8, 4, 2), Mamba2(16, 8, 4, 2, head_dim=16)
    blocks = [Block(mixer, 16, 0.0, residual=True, recipe=recipe) for mixer, recipe in zip(mixers, IN_KERNELS)]
    # the reference is called in float64, on the CPU whatever the device
    layers = {
        torch.float32: [copy.deepcopy(block).to(device) for block in blocks],
        torch.float64: [copy.deepcopy(block).double() for block in blocks],
    }
    carried = [torch.rand_like(t, device=device) for mixer in mixers for t in mixer.alloc_state(batch)]

    def call(u: Tensor, *parts: Tensor) -> Tensor:
        with torch.no_grad():
            first, second = layers[u.dtype]
            found = [first.step(u, MixerState(*parts[:2])), second.step(u, MixerState(*parts[2:]))]
        row = torch.cat([t.flatten() for y, state in found for t in (y, *state)])
        return row + 0 * sum(t.sum() for t in (u, *parts))

    return selftest.Example(call, [torch.randn(batch, 16, device=device), *carried])


class _Model(nn.Module):
    """Blocks of every mixer behind item embeddings, as our models are built."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        mixers = Mamba(16, 8, 4, 2), Mamba2(16, 8, 4, 2, head_dim=16), Hydra(16, 8, 3, 2, head_dim=16)
        self.item_embedding = nn.Embedding(50, 16)
        self.norm, self.last_norm = outer_norms(16, recipe)
        self.blocks = nn.ModuleList(Block(mixer, 16, 0.0, residual=True, recipe=recipe) for mixer in mixers)

    @in_one_call
    def encode(self, items_L: Tensor, cu_seqlens: Tensor, *, last_only: bool = False) -> Tensor:
        u, last = self.norm(self.item_embedding(items_L))[None], self.blocks[-1]
        for block in self.blocks:
            u, _ = block(u, cu_seqlens=cu_seqlens, last_only=last_only and block is last, return_state=False)
        out: Tensor = self.last_norm(u)
        return out


def _example_of_a_history(device: torch.device, batch: int) -> selftest.Example:
    """Histories of several lengths through a block of every mixer, with norms behind and before its parts; as a step,
    without a gradient.
    """
    both = [_Model(recipe) for recipe in IN_KERNELS]
    models = {
        torch.float32: [copy.deepcopy(model).to(device) for model in both],
        torch.float64: [model.double() for model in both],
    }
    lengths = torch.arange(batch) * 30 + 7

    def call(row: Tensor) -> Tensor:
        with torch.no_grad():
            bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(row.device)
            items = torch.arange(int(lengths.sum()), device=row.device) % 50
            found = torch.cat([model.encode(items, bounds, last_only=True) for model in models[row.dtype]])
        return found + 0 * row.sum()

    return selftest.Example(call, [torch.randn(1, device=device)])


selftest.more_examples["step"] = _example_of_a_step
selftest.more_examples["history"] = _example_of_a_history
