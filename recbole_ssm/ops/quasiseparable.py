"""The quasiseparable mixer of Hydra (Hwang et al. 2024, arXiv 2407.09941, section 3.2), without its diagonal.

    y = shift(SS(x)) + flip(shift(SS(flip(x))))

SS is :func:`recbole_ssm.ops.ssd`; shift moves every row one place along time and puts a zero
row first. So row t sees what a forward scan knew at t - 1 and what a backward scan knew at t +
1: the strictly lower and the strictly upper part of one matrix. The diagonal is free, and the
layer adds it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import dispatch, implements
from recbole_ssm.ops.numerics import at_least_float32, decay_of
from recbole_ssm.ops.packing import map_padded, map_sequences
from recbole_ssm.ops.ssd import heads, log_decay, scores, ssd_padded, tiled
from recbole_ssm.ops.ssd import reference as ssd_reference
from recbole_ssm.ops.table import check


def quasiseparable(
    x_BLHP: Tensor,
    dt_fwd: Tensor,
    dt_bwd: Tensor,
    A_H: Tensor,
    B_fwd: Tensor,
    C_fwd: Tensor,
    B_bwd: Tensor,
    C_bwd: Tensor,
    *,
    lengths_B: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Strictly lower plus strictly upper part of a quasiseparable matrix, applied to x.

    Args:
        x_BLHP: input ``[B, L, H, P]``, right-padded where ``lengths_B`` says so, or a packed
            batch ``[1, total, H, P]`` with ``cu_seqlens``.
        dt_fwd, dt_bwd: positive step sizes of either direction ``[B, L, H]``.
        A_H: ``[H]``, negative, shared by both directions.
        B_fwd, C_fwd, B_bwd, C_bwd: input and output maps ``[B, L, G, N]``.
        lengths_B: real length of each row ``[B]``, or None for full rows. Positions behind it
            influence nothing, and their own y is zero.
        cu_seqlens: bounds ``[S + 1]`` of the packed sequences.

    Returns:
        y ``[B, L, H, P]`` in the dtype of x.

    Raises:
        ValueError: a shape, ``lengths_B`` or ``cu_seqlens`` does not fit, or both of the latter
            are given.
    """
    op = "quasiseparable"
    maps = (A_H, B_fwd, C_fwd, B_bwd, C_bwd)
    sizes = check(op, x_BLHP, dt_fwd, dt_bwd, *maps, cu_seqlens)
    function = dispatch(op, x_BLHP)
    if lengths_B is None:
        return function(x_BLHP, dt_fwd, dt_bwd, *maps, cu_seqlens)
    if cu_seqlens is not None:
        raise ValueError(f"{op}: give lengths_B for a padded batch or cu_seqlens for a packed one, not both")
    L = sizes["L"]
    if tuple(lengths_B.shape) != (sizes["B"],):
        raise ValueError(f"{op}: lengths must have shape [{sizes['B']}], got {list(lengths_B.shape)}")
    # on a GPU the CPU would have to wait for the values, so there they are taken as they are
    if not lengths_B.is_cuda and not bool(((lengths_B >= 0) & (lengths_B <= L)).all()):
        raise ValueError(f"{op}: lengths must lie between 0 and {L}, got {lengths_B.tolist()}")
    padding_BL1 = (torch.arange(L, device=x_BLHP.device) >= lengths_B[:, None])[..., None]
    # A step of size 0 is silent: decay 1, input 0. What is not finite would be NaN even so.
    dt_fwd, dt_bwd = (t.masked_fill(padding_BL1, 0) for t in (dt_fwd, dt_bwd))
    x, *maps_BLGN = (t.masked_fill(padding_BL1[..., None], 0) for t in (x_BLHP, *maps[1:]))
    y: Tensor = function(x, dt_fwd, dt_bwd, A_H, *maps_BLGN, None)
    return y.masked_fill(padding_BL1[..., None], 0)


def _shift(y: Tensor) -> Tensor:
    """One place later along time, zeros first."""
    return F.pad(y, (0, 0, 0, 0, 1, 0))[:, :-1]


@implements("quasiseparable", "reference")
@at_least_float32
def _reference(
    x: Tensor,
    dt_fwd: Tensor,
    dt_bwd: Tensor,
    A: Tensor,
    B_fwd: Tensor,
    C_fwd: Tensor,
    B_bwd: Tensor,
    C_bwd: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    def one(x: Tensor, *rest: Tensor | None) -> tuple[Tensor, None]:
        dt_f, dt_b, B_f, C_f, B_b, C_b = (t for t in rest if t is not None)
        forward, _ = ssd_reference(x, dt_f, A, B_f, C_f, None, None, None, False)
        backward, _ = ssd_reference(x.flip(1), dt_b.flip(1), A, B_b.flip(1), C_b.flip(1), None, None, None, False)
        return _shift(forward) + _shift(backward).flip(1), None

    arguments = (x, dt_fwd, dt_bwd, B_fwd, C_fwd, B_bwd, C_bwd)
    return map_sequences(one, arguments, None, cu_seqlens)[0]


# --- torch: one matrix for both directions, or two chunked scans where that grows too large ---

ONE_MATRIX = 160  # up to this length


def one_matrix(x: Tensor, S_fwd: Tensor, S_bwd: Tensor, dt_fwd: Tensor, dt_bwd: Tensor, *maps: Tensor) -> Tensor:
    """Both strict triangles in one ``[b, H, L, L]`` matrix; row t reads C and the decay of its neighbour t -+ 1."""
    B_fwd, C_fwd, B_bwd, C_bwd = maps
    _, L, H, _ = x.shape
    lower = torch.ones(L, L, dtype=torch.bool, device=x.device).tril(-1)
    to_past = S_fwd.roll(1, -1)[..., :, None] - S_fwd[..., None, :]  # row t: decay from s to t - 1
    to_future = S_bwd.roll(-1, -1)[..., :, None] - S_bwd[..., None, :]
    decay = decay_of(torch.where(lower, to_past, to_future).to(x.dtype))  # [b, H, L, L]
    score = scores(C_fwd.roll(1, 1), B_fwd).tril(-1) + scores(C_bwd.roll(-1, 1), B_bwd).triu(1)
    dt = torch.where(lower, dt_fwd.transpose(1, 2)[:, :, None], dt_bwd.transpose(1, 2)[:, :, None])
    return ((heads(score, H) * decay * dt) @ x.transpose(1, 2)).transpose(1, 2)


def _padded(
    A: Tensor, x: Tensor, B_fwd: Tensor, C_fwd: Tensor, B_bwd: Tensor, C_bwd: Tensor, dt_fwd: Tensor, dt_bwd: Tensor
) -> Tensor:
    _, L, H, _ = x.shape
    if L == 0:
        return x
    if L <= ONE_MATRIX:
        S_fwd = log_decay(dt_fwd, A)
        S_bwd = log_decay(dt_bwd.flip(1), A).flip(-1)
        return tiled(one_matrix, H * L * L, x, S_fwd, S_bwd, dt_fwd, dt_bwd, B_fwd, C_fwd, B_bwd, C_bwd)
    forward, _ = ssd_padded(x, B_fwd, C_fwd, dt_fwd, A, None, False)
    backward, _ = ssd_padded(x.flip(1), B_bwd.flip(1), C_bwd.flip(1), dt_bwd.flip(1), A, None, False)
    return _shift(forward) + _shift(backward).flip(1)


@implements("quasiseparable", "torch")
@at_least_float32
def torch_quasiseparable(
    x: Tensor,
    dt_fwd: Tensor,
    dt_bwd: Tensor,
    A: Tensor,
    B_fwd: Tensor,
    C_fwd: Tensor,
    B_bwd: Tensor,
    C_bwd: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """:func:`quasiseparable` on any device and in any precision."""

    def padded(*tensors_and_state: Tensor) -> tuple[Tensor, None]:
        return _padded(A, *tensors_and_state[:-1]), None

    return map_padded(padded, (x, B_fwd, C_fwd, B_bwd, C_bwd, dt_fwd, dt_bwd), None, cu_seqlens)[0]
