"""What the Triton kernels share. Blocks of memory are written as in ``x [BT, BD]``: BT positions of BD channels."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # a power of two is one instruction, one of e is two


@triton.jit
def read(tensor, index, real):
    """Numbers in float32, whatever they are in memory; zeros where nothing is."""
    return tl.load(tensor + index, mask=real, other=0.0).to(tl.float32)


@triton.jit
def rows_of(offsets, s, L, rows):
    """Begin and length of sequence s: a row of a padded batch, or what ``offsets`` bounds of a packed one.

    Bounds are held within the batch, so that wrong ones give wrong numbers and not a crash.
    """
    if offsets is None:
        begin = s * L
        end = begin + L
    else:
        begin = tl.maximum(tl.load(offsets + s), 0)
        end = tl.minimum(tl.load(offsets + s + 1), rows)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def softplus(v):
    """log(1 + e^v), to the last digits of a small result too."""
    e = tl.exp(-tl.abs(v))
    u = 1.0 + e  # rounded; the quotient below takes the rounding back (Kahan's log1p)
    return tl.maximum(v, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def silu_slope(v):
    """The derivative of v sigmoid(v)."""
    g = tl.sigmoid(v)
    return g * (1.0 + v * (1.0 - g))
