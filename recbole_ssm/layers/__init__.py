"""Modules with ``forward`` over whole sequences and ``step`` over one event, side by side: one formula, two ways.

Dimension letters are those of :mod:`recbole_ssm.ops`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from recbole_ssm.layers.block import Block, Dropout, FeedForward
from recbole_ssm.layers.hydra import Hydra
from recbole_ssm.layers.mamba import Mamba
from recbole_ssm.layers.mamba2 import Mamba2
from recbole_ssm.layers.state import MixerState
from recbole_ssm.ops import selftest

__all__ = ["Block", "Dropout", "FeedForward", "Hydra", "Mamba", "Mamba2", "MixerState"]


def _example_of_a_step(device: torch.device, batch: int) -> selftest.Example:
    """One event through both causal mixers, with all that comes of it in one row.

    The kernel of a step has no gradient, so that of the row is zero.
    """
    mixers = Mamba(16, 8, 4, 2), Mamba2(16, 8, 4, 2, head_dim=16)
    # the reference is called in float64, on the CPU whatever the device
    layers = {
        torch.float32: [copy.deepcopy(mixer).to(device) for mixer in mixers],
        torch.float64: [copy.deepcopy(mixer).double() for mixer in mixers],
    }
    carried = [torch.rand_like(t, device=device) for mixer in mixers for t in mixer.alloc_state(batch)]

    def call(u: Tensor, *parts: Tensor) -> Tensor:
        with torch.no_grad():
            first, second = layers[u.dtype]
            found = [first.step(u, MixerState(*parts[:2])), second.step(u, MixerState(*parts[2:]))]
        row = torch.cat([t.flatten() for y, state in found for t in (y, *state)])
        return row + 0 * sum(t.sum() for t in (u, *parts))

    return selftest.Example(call, [torch.randn(batch, 16, device=device), *carried])


selftest.more_examples["step"] = _example_of_a_step
