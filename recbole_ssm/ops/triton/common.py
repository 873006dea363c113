"""What the Triton kernels share. Blocks of memory are written as in ``x [BT, BD]``: BT positions of BD channels."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # a power of two is one instruction, one of e is two


@triton.jit
def read(tensor, index, real):
    """Numbers in float32, whatever they are in memory; zeros where nothing is."""
    return tl.load(tensor + index, mask=real, other=0.0).to(tl.float32)


@triton.jit
def read_if_given(tensor, index, real):
    """As :func:`read`, and zeros where the tensor is None."""
    found = tl.zeros(index.shape, tl.float32)
    if tensor is not None:
        found = read(tensor, index, real)
    return found


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


@triton.jit
def join(
    states, steps, A, first, state, final, cells, columns, alike, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Replace what each piece of a sequence adds to a state by the state at its start. Grid (S, cells / BLOCK).

    The pieces of sequence s are those from first[s] to before first[s + 1]; REVERSE walks from
    the last. A piece has ``cells`` numbers of its state and ``columns`` sums of steps. So many
    neighbouring cells as ``alike`` says share a rate of A, and rate r goes with sum r % columns.
    """
    s = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, rate = cell < cells, cell // alike
    A_B = read(A, rate, real) * LOG2E
    h = read_if_given(state, s * cells + cell, real)
    begin, end = tl.load(first + s), tl.load(first + s + 1)
    for i in range(0, end - begin):
        piece = end - 1 - i if REVERSE else begin + i
        added = read(states, piece * cells + cell, real)
        decay = tl.exp2(A_B * read(steps, piece * columns + rate % columns, real))
        tl.store(states + piece * cells + cell, h, mask=real)
        h = decay * h + added
    if final is not None:
        tl.store(final + s * cells + cell, h, mask=real)
