"""The last position of few long sequences, from the state at their end, which their pieces find at once.

The kernels of the last position walk along a sequence, and are for many short ones. Where
sequences are few and long (:func:`recbole_ssm.ops.triton.pieces.worthwhile`), those of all
positions find the state in pieces; what else the last position needs is little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.packing import last_of
from recbole_ssm.ops.triton import operators, pieces
from recbole_ssm.ops.triton.launch import processors


def _few_and_long(x: Tensor, sequences: int, warps: int) -> bool:
    """Whether sequences are cut; compiled code always walks, because the compiler need not know the GPU."""
    rows = x.shape[0] * x.shape[1]
    return not torch.compiler.is_compiling() and pieces.worthwhile(sequences, rows, warps, processors(x))


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
    if not _few_and_long(x, len(C), operators.scan_warps(*A.shape)):
        y: Tensor = operators.OPERATORS["selective_scan_last"](x, dt, A, B, C, D, z, dt_bias, cu_seqlens, softplus)
        return y
    scan = operators.OPERATORS["selective_scan"]
    # no output but the state is used, so any map serves for C
    _, final = scan(x, dt, A, B, B.detach(), None, None, dt_bias, None, cu_seqlens, softplus)
    y = (final * C[:, None]).sum(-1)
    if D is not None:
        y = y + D * last_of(x, cu_seqlens).float()
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(x.dtype)


def ssd_last(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """:func:`recbole_ssm.ops.ssd_last`, from step sizes as they are."""
    if not _few_and_long(x, len(C), operators.ssd_warps(x.shape[2])):
        y: Tensor = operators.OPERATORS["ssd_last"](x, dt, A, B, C, D, cu_seqlens)
        return y
    _, final = operators.OPERATORS["ssd"](x, dt, A, B, B.detach(), None, None, cu_seqlens, True)
    y = (final * C.repeat_interleave(x.shape[2] // C.shape[1], 1)[:, :, None]).sum(-1)
    if D is not None:
        y = y + D[:, None] * last_of(x, cu_seqlens).float()
    return y.to(x.dtype)


LAST: dict[str, Callable[..., Any]] = {"selective_scan_last": selective_scan_last, "ssd_last": ssd_last}
"""By name of the op; the operators of the same names walk."""
