"""Triton kernels of the short depthwise convolution: y_t = act(b + sum_k w_k x_{t - lead + k}), lead taps before t.

A program computes BT positions of BD channels. Its rows may belong to several sequences:
``of_row`` [rows] names the sequence of each, and a tap that falls outside of it reads zero or
the carried state [S, K, D], newest input last.
"""

import triton
import triton.language as tl

from recbole_ssm.ops.triton.common import read, rows_of, silu_slope


@triton.jit
def _bounds_of(offsets, of_row, row, real_T, L, rows):
    """Sequence [BT] of each row, its begin and its end.

    It returns once, at its end: before 3.7 Triton compiles what follows a return too, and
    of_row may be None there.
    """
    if offsets is None:
        s = row // L
        begin = s * L
        end = begin + L
    else:
        s = tl.load(of_row + row, mask=real_T, other=0).to(tl.int64)
        begin = tl.maximum(tl.load(offsets + s, mask=real_T, other=0), 0)
        end = tl.minimum(tl.load(offsets + s + 1, mask=real_T, other=0), rows)
    return s, begin, end


@triton.jit
def _tap(x, sx, state, s, begin, end, at, d, D, real, K: tl.constexpr):
    """Input [BT, BD] at rows ``at`` of their sequences."""
    inside = ((at >= begin) & (at < end))[:, None] & real
    x_T = read(x, at[:, None] * sx + d[None, :], inside)
    if state is not None:
        carried = (at < begin)[:, None] & real
        x_T += read(state, (s * K + K + at - begin)[:, None] * D + d[None, :], carried)
    return x_T


@triton.jit
def _window_sum(
    x, sx, weight, bias, state, s, begin, end, row, d, D, real, real_D,
    LEAD: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """b + sum_k w_k x_{t - lead + k} [BT, BD]."""
    sum_TD = tl.zeros((BT, BD), tl.float32)
    for k in tl.static_range(K):
        w_k = read(weight, d * K + k, real_D)
        sum_TD += w_k[None, :] * _tap(x, sx, state, s, begin, end, row + k - LEAD, d, D, real, K)
    if bias is not None:
        sum_TD += read(bias, d, real_D)[None, :]
    return sum_TD


@triton.jit
def conv_forward(
    x, sx, weight, bias, state, offsets, of_row, y, rows, L, D,
    SILU: tl.constexpr, LEAD: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (rows / BT, D / BD). Writes y [rows, D]."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    real_T, real_D = row < rows, d < D
    real = real_T[:, None] & real_D[None, :]
    s, begin, end = _bounds_of(offsets, of_row, row, real_T, L, rows)
    y_TD = _window_sum(x, sx, weight, bias, state, s, begin, end, row, d, D, real, real_D, LEAD, K, BT, BD)
    if SILU:
        y_TD *= tl.sigmoid(y_TD)
    tl.store(y + row[:, None] * D + d[None, :], y_TD, mask=real)


@triton.jit
def conv_gradient(
    gy, sgy, x, sx, weight, bias, state, offsets, of_row, gsum, gweight, gbias, rows, L, D,
    SILU: tl.constexpr, LEAD: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (rows / BT, D / BD). Writes the gradient of the sum within the activation, gsum [rows, D], and the share of
    these rows in the gradients of the taps, gweight [rows / BT, D, K], and of the bias, gbias [rows / BT, D].
    """  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    real_T, real_D = row < rows, d < D
    real = real_T[:, None] & real_D[None, :]
    s, begin, end = _bounds_of(offsets, of_row, row, real_T, L, rows)
    g_TD = read(gy, row[:, None] * sgy + d[None, :], real)
    if SILU:
        sum_TD = _window_sum(x, sx, weight, bias, state, s, begin, end, row, d, D, real, real_D, LEAD, K, BT, BD)
        g_TD *= silu_slope(sum_TD)
    tl.store(gsum + row[:, None] * D + d[None, :], g_TD, mask=real)
    share = tl.program_id(0).to(tl.int64) * D + d
    for k in tl.static_range(K):
        x_TD = _tap(x, sx, state, s, begin, end, row + k - LEAD, d, D, real, K)
        tl.store(gweight + share * K + k, tl.sum(g_TD * x_TD, 0), mask=real_D)
    if gbias is not None:
        tl.store(gbias + share, tl.sum(g_TD, 0), mask=real_D)


@triton.jit
def conv_state(x, sx, state, offsets, final, rows, L, D, K: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """The last K inputs of each sequence [S, K, D], those before it where it is shorter. Grid (S, D / BD)."""
    s = tl.program_id(0).to(tl.int64)
    d, k = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BK)
    real = (k < K)[:, None] & (d < D)[None, :]
    begin, length = rows_of(offsets, s, L, rows)
    at = length - K + k  # position within the sequence
    last = read(x, (begin + at)[:, None] * sx + d[None, :], (at >= 0)[:, None] & real)
    if state is not None:
        last += read(state, (s * K + K + at)[:, None] * D + d[None, :], (at < 0)[:, None] & real)
    tl.store(final + (s * K + k)[:, None] * D + d[None, :], last, mask=real)


@triton.jit
def conv_state_gradient(
    gfinal, gsum, weight, offsets, gx, gstate, rows, L, D, K: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr
):
    """Adds gfinal [S, K, D] to the last rows of gx [rows, D], and writes gstate [S, K, D]. Grid (S, D / BD)."""
    s = tl.program_id(0).to(tl.int64)
    d, k = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BK)
    real = (k < K)[:, None] & (d < D)[None, :]
    begin, length = rows_of(offsets, s, L, rows)
    if gfinal is not None:
        at = length - K + k
        within = (at >= 0)[:, None] & real
        into = gx + (begin + at)[:, None] * D + d[None, :]
        g_KD = read(gfinal, (s * K + k)[:, None] * D + d[None, :], within)
        tl.store(into, tl.load(into, mask=within, other=0.0) + g_KD, mask=within)
    if gstate is not None:
        # carried input k is tap K - 1 - (t + K - k) = k - 1 - t of position t, and input k - length of the final state
        g_KD = tl.zeros((BK, BD), tl.float32)
        for t in tl.static_range(K - 1):
            reached = (k > t) & (k < K)
            w_KD = read(weight, d[None, :] * K + (k - 1 - t)[:, None], reached[:, None] & real)
            g_D = read(gsum, (begin + t) * D + d, d < tl.where(t < length, D, 0))
            g_KD += w_KD * g_D[None, :]
        if gfinal is not None:
            kept = (k >= length)[:, None] & real
            g_KD += read(gfinal, (s * K + k - length)[:, None] * D + d[None, :], kept)
        tl.store(gstate + (s * K + k)[:, None] * D + d[None, :], g_KD, mask=real)
