"""Triton kernels of the cross-entropy against a catalogue: logits [BR rows, BV items] in registers, never in memory.

    x = output items^T + bias      loss_r = log(sum_v exp(x_rv)) - x_rt
    gradient of x_rv = weight_r (exp(x_rv) / sum_u exp(x_ru) - [v = t])

The forward leaves each row's logarithm of the sum. From it both gradients make the logits again, since registers hold
them for free where memory would be read and written; one program adds them up for a block of rows, the other for a
block of items. Rows, or items, are shared out among as many programs as a GPU holds; each writes a sum of its own and
PyTorch adds these, so that results repeat bit for bit.
"""

import triton
import triton.language as tl

from recbole_ssm.ops.triton.common import LOG2E, read

LEAST: tl.constexpr = tl.constexpr(-3.0e38)


@triton.jit
def _logits(
    output, items, bias, ids, target_R, r, v, n, V, d,
    BR: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [BR, BV] in base 2, minus infinity where an item does not count."""
    x = tl.zeros((BR, BV), tl.float32)
    real = v < V
    for first in range(0, d, BK):
        k = first + tl.arange(0, BK)
        o = read(output, r[:, None] * d + k[None, :], (r < n)[:, None] & (k < d)[None, :])
        i = read(items, v[:, None] * d + k[None, :], real[:, None] & (k < d)[None, :])
        x += tl.dot(o, tl.trans(i), input_precision=PRECISION)
    if bias is not None:
        x += tl.load(bias + v, mask=real, other=0.0)[None, :]
    if ids is not None:
        real_RV = real[None, :] & (tl.load(ids + v, mask=real, other=-1)[None, :] != target_R[:, None])
    else:
        real_RV = tl.broadcast_to(real[None, :], (BR, BV))
    return tl.where(real_RV, x * LOG2E, float("-inf"))


@triton.jit
def loss_forward(
    output, items, target, bias, ids, highest, sums, flat, own, n, V, d, tiles,
    BR: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, shares). Writes [shares, n]: maximum, sum of 2^(x - maximum), sum of x, the target's x."""
    r, share = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.program_id(1).to(tl.int64)
    target_R = tl.load(target + r, mask=r < n, other=-1)
    most = tl.full((BR,), LEAST, tl.float32)
    total = tl.zeros((BR,), tl.float32)
    linear = tl.zeros((BR,), tl.float32)
    at_target = tl.zeros((BR,), tl.float32)
    for tile in range(0, tiles):
        v = (share * tiles + tile) * BV + tl.arange(0, BV)
        x = _logits(output, items, bias, ids, target_R, r, v, n, V, d, BR, BV, BK, PRECISION)
        higher = tl.maximum(most, tl.max(x, 1))
        total = total * tl.exp2(most - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        most = higher
        linear += tl.sum(tl.where(x > float("-inf"), x, 0.0), 1)
        if ids is None:
            at_target += tl.sum(tl.where(v[None, :] == target_R[:, None], x, 0.0), 1)
    at = share * n + r
    tl.store(highest + at, most, mask=r < n)
    tl.store(sums + at, total, mask=r < n)
    tl.store(flat + at, linear, mask=r < n)
    tl.store(own + at, at_target, mask=r < n)


@triton.jit
def loss_settle(
    highest, sums, flat, own, weight, uniform, losses, lse, g_own, n, hot, shares,
    SAMPLED: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, 1): from the shares of each row to its weighted loss and the logarithm of its sum [n].

    ``uniform`` holds what label smoothing gives to each item of a target's weight, ``hot`` is what it leaves to the
    target. Where candidates are sampled ``own`` [n] holds the targets' logits, and g_own [n] gets their gradients.
    """
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    real = r < n
    at_target = tl.zeros((BR,), tl.float32)
    if SAMPLED:
        at_target = tl.load(own + r, mask=real, other=0.0) * LOG2E
    most = tl.full((BR,), LEAST, tl.float32)
    if SAMPLED:
        most = at_target
    for share in range(0, shares):
        most = tl.maximum(most, tl.load(highest + share * n + r, mask=real, other=LEAST))
    total = tl.zeros((BR,), tl.float32)
    if SAMPLED:
        total = tl.exp2(at_target - most)
    linear = tl.zeros((BR,), tl.float32)
    for share in range(0, shares):
        higher = tl.load(highest + share * n + r, mask=real, other=LEAST)
        total += tl.load(sums + share * n + r, mask=real, other=0.0) * tl.exp2(higher - most)
        linear += tl.load(flat + share * n + r, mask=real, other=0.0)
        if not SAMPLED:
            at_target += tl.load(own + share * n + r, mask=real, other=0.0)
    log_sum = most + tl.log2(tl.where(real, total, 1.0))
    w = tl.load(weight + r, mask=real, other=0.0)
    terms = log_sum - hot * at_target - tl.load(uniform) * linear
    tl.store(losses + r, w * terms / LOG2E, mask=real)
    tl.store(lse + r, log_sum, mask=real)
    if SAMPLED:
        tl.store(g_own + r, w * (tl.exp2(at_target - log_sum) - 1.0), mask=real)


@triton.jit
def _gradient(
    x, weight, lse, uniform, target_R, r, v, n, hot, SAMPLED: tl.constexpr,
):  # fmt: skip
    """The gradient [BR, BV] of the logits x; zero where an item does not count, and behind the last row."""
    w = tl.load(weight + r, mask=r < n, other=0.0)[:, None]
    log_sum = tl.load(lse + r, mask=r < n, other=0.0)[:, None]
    g = w * (tl.exp2(x - log_sum) - tl.load(uniform))
    if not SAMPLED:
        g -= tl.where(v[None, :] == target_R[:, None], w * hot, 0.0)
    return tl.where(x > float("-inf"), g, 0.0)


@triton.jit
def loss_output(
    output, items, target, bias, ids, weight, lse, uniform, gradient, n, V, d, hot, tiles,
    SAMPLED: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, shares of the items). Writes each share's gradient of the output [shares, n, d]."""
    r, share = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BD)
    target_R = tl.load(target + r, mask=r < n, other=-1)
    total = tl.zeros((BR, BD), tl.float32)
    for tile in range(0, tiles):
        v = (share * tiles + tile) * BV + tl.arange(0, BV)
        x = _logits(output, items, bias, ids, target_R, r, v, n, V, d, BR, BV, BK, PRECISION)
        g = _gradient(x, weight, lse, uniform, target_R, r, v, n, hot, SAMPLED)
        i = read(items, v[:, None] * d + c[None, :], (v < V)[:, None] & (c < d)[None, :])
        total += tl.dot(g, i, input_precision=PRECISION)
    tl.store(gradient + (share * n + r[:, None]) * d + c[None, :], total, mask=(r < n)[:, None] & (c < d)[None, :])


@triton.jit
def loss_items(
    output, items, target, bias, ids, weight, lse, uniform, gradient, n, V, d, hot, tiles,
    SAMPLED: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of items, shares of the rows). Writes each share's gradient of the items [shares, V, d]."""
    v, share = tl.program_id(0).to(tl.int64) * BV + tl.arange(0, BV), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BD)
    total = tl.zeros((BV, BD), tl.float32)
    for tile in range(0, tiles):
        r = (share * tiles + tile) * BR + tl.arange(0, BR)
        target_R = tl.load(target + r, mask=r < n, other=-1)
        x = _logits(output, items, bias, ids, target_R, r, v, n, V, d, BR, BV, BK, PRECISION)
        g = _gradient(x, weight, lse, uniform, target_R, r, v, n, hot, SAMPLED)
        o = read(output, r[:, None] * d + c[None, :], (r < n)[:, None] & (c < d)[None, :])
        total += tl.dot(tl.trans(g), o, input_precision=PRECISION)
    tl.store(gradient + (share * V + v[:, None]) * d + c[None, :], total, mask=(v < V)[:, None] & (c < d)[None, :])
