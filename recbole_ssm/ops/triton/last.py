"""A scan's last position in few long sequences, from the state at their end, which their pieces find at once.

The kernel of the last position walks along a sequence, which is right for many short ones. Where
sequences are few and long (:func:`recbole_ssm.ops.triton.pieces.worthwhile`), that of all
positions finds the state in pieces. SSD's last position is not cut: on the GPU that was measured
its walk along 16,000 events takes half a millisecond.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.packing import last_of
from recbole_ssm.ops.triton import operators, pieces
from recbole_ssm.ops.triton.launch import processors


def selective_scan_last(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
) -> Tensor:
    """:func:`recbole_ssm.ops.selective_scan_last`."""
    rows, programs = x.shape[0] * x.shape[1], operators.scan_programs(*A.shape)
    # The compiler is not to ask which GPU it compiles for.
    if torch.compiler.is_compiling() or not pieces.worthwhile(len(C), rows, programs, processors(x)):
        y: Tensor = operators.OPERATORS["selective_scan_last"](x, dt, A, B, C, D, z, dt_bias, cu_seqlens, softplus)
        return y
    scan = operators.OPERATORS["selective_scan"]
    # Nothing but the state is used, so any map serves in the place of C.
    _, final = scan(x, dt, A, B, B.detach(), None, None, dt_bias, None, cu_seqlens, softplus)
    y = (final * C[:, None]).sum(-1)
    if D is not None:
        # Wrong bounds give wrong numbers, as in the kernels, and lead nowhere else.
        bounds = None if cu_seqlens is None else cu_seqlens.clamp(0, rows)
        y = y + D * last_of(x, bounds).float()
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(x.dtype)
