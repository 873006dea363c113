"""Triton kernels of the selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = (C_t h_t + D x_t) SiLU(z_t).

A program carries the states of BD channels ``[BN, BD]`` through time in its registers: with one
warp, a lane holds one channel and all its N states, so a step needs no exchange between lanes
but for the sums over channels. Nothing but inputs, outputs, and one state every CHUNK steps
touches memory.

Letters as in :mod:`recbole_ssm.ops`. ``x, sx`` is a tensor and the stride of its rows; A is [N,
D], as the states; BN and BD are N and a share of D, rounded up to powers of two.
"""

import triton
import triton.language as tl

from recbole_ssm.ops.triton.common import LOG2E, read, rows_of, silu_slope, softplus


@triton.jit
def _step_size(dt, dt_bias, d, real_D, SOFTPLUS: tl.constexpr):
    """dt_t [BD] as the recurrence uses it, and the derivative of that by dt as given."""
    dt_t = read(dt, d, real_D)
    if dt_bias is not None:
        dt_t += read(dt_bias, d, real_D)
    slope = tl.full(dt_t.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = tl.sigmoid(dt_t)
        dt_t = softplus(dt_t)
    return dt_t, slope


@triton.jit
def _decay_rates(A, cell, real):
    """A [BN, BD] times log2(e)."""
    return read(A, cell, real) * LOG2E


@triton.jit
def scan_forward(
    x, sx, dt, sdt, A, B, sB, C, sC, skip, z, sz, dt_bias, state, offsets, y, final, kept,
    rows, L, D, N, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (S, D / BD). Writes y [rows, D], final [S, N, D], and kept [rows // CHUNK, N, D] where it is given."""
    s = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BN)
    real_D, real_N = d < D, n < N
    real = real_N[:, None] & real_D[None, :]
    cell = n[:, None] * D + d[None, :]  # within a state [N, D]
    A_ND = _decay_rates(A, cell, real)
    h = tl.zeros((BN, BD), tl.float32)
    if state is not None:
        h = read(state, s * N * D + cell, real)
    begin, length = rows_of(offsets, s, L, rows)
    for t in range(0, length):
        row = begin + t
        if kept is not None:
            if (t > 0) & (t % CHUNK == 0):  # such rows are CHUNK apart and more, so each has a place of its own
                tl.store(kept + (row // CHUNK - 1) * N * D + cell, h, mask=real)
        x_t = read(x, row * sx + d, real_D)
        dt_t, _ = _step_size(dt + row * sdt, dt_bias, d, real_D, SOFTPLUS)
        B_t = read(B, row * sB + n, real_N)
        C_t = read(C, row * sC + n, real_N)
        h = tl.exp2(dt_t[None, :] * A_ND) * h + (dt_t * x_t)[None, :] * B_t[:, None]
        y_t = tl.sum(h * C_t[:, None], 0)
        if skip is not None:
            y_t += read(skip, d, real_D) * x_t
        if z is not None:
            z_t = read(z, row * sz + d, real_D)
            y_t *= z_t * tl.sigmoid(z_t)
        tl.store(y + row * D + d, y_t, mask=real_D)
    tl.store(final + s * N * D + cell, h, mask=real)


@triton.jit
def scan_backward(
    gy, sgy, gfinal, x, sx, dt, sdt, A, B, sB, C, sC, skip, z, sz, dt_bias, state, offsets, kept,
    gx, gdt, gA, gB, gC, gskip, gz, gdt_bias, gstate, scratch,
    rows, L, D, N, S, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (programs, D / BD); a program takes every programs-th sequence, and walks it from its end.

    Of each chunk it first computes the states again, from the one that was kept, into
    ``scratch`` [programs, D / BD, CHUNK, BN, BD], which is small enough for the cache. It
    writes gx, gdt, gz [rows, D] and gstate [S, N, D] whole; of gB and gC its channels' share [D
    / BD, rows, N]; of gA [programs, N, D], gskip and gdt_bias [programs, D] its sequences'
    share. Their sums are taken outside, always in the same order.
    """
    program = tl.program_id(0)
    d, n = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BN)
    real_D, real_N = d < D, n < N
    real = real_N[:, None] & real_D[None, :]
    cell = n[:, None] * D + d[None, :]
    A_ND = _decay_rates(A, cell, real)
    place = (program * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * CHUNK
    recomputed = scratch + place * BN * BD + n[:, None] * BD + tl.arange(0, BD)[None, :]
    share = tl.program_id(1).to(tl.int64) * rows  # of gB and gC
    gA_ND = tl.zeros((BN, BD), tl.float32)
    gskip_D = tl.zeros((BD,), tl.float32)
    gbias_D = tl.zeros((BD,), tl.float32)
    D_D = tl.zeros((BD,), tl.float32)
    if skip is not None:
        D_D = read(skip, d, real_D)
    for sequence in range(program, S, tl.num_programs(0)):
        s = tl.full((), 1, tl.int64) * sequence
        gh = tl.zeros((BN, BD), tl.float32)
        if gfinal is not None:
            gh = read(gfinal, s * N * D + cell, real)
        begin, length = rows_of(offsets, s, L, rows)
        chunks = tl.cdiv(length, CHUNK)
        for c in range(0, chunks):
            first = (chunks - 1 - c) * CHUNK
            steps = tl.minimum(CHUNK, length - first)
            if first > 0:
                h = read(kept, ((begin + first) // CHUNK - 1) * N * D + cell, real)
            else:
                h = tl.zeros((BN, BD), tl.float32)
                if state is not None:
                    h = read(state, s * N * D + cell, real)
            for i in range(0, steps):  # the state before each step of the chunk
                tl.store(recomputed + i * BN * BD, h)
                row = begin + first + i
                x_t = read(x, row * sx + d, real_D)
                dt_t, _ = _step_size(dt + row * sdt, dt_bias, d, real_D, SOFTPLUS)
                B_t = read(B, row * sB + n, real_N)
                h = tl.exp2(dt_t[None, :] * A_ND) * h + (dt_t * x_t)[None, :] * B_t[:, None]
            tl.debug_barrier()
            for j in range(0, steps):
                i = steps - 1 - j
                row = begin + first + i
                x_t = read(x, row * sx + d, real_D)
                dt_t, slope = _step_size(dt + row * sdt, dt_bias, d, real_D, SOFTPLUS)
                B_t = read(B, row * sB + n, real_N)
                C_t = read(C, row * sC + n, real_N)
                gy_t = read(gy, row * sgy + d, real_D)
                decay = tl.exp2(dt_t[None, :] * A_ND)
                decayed = decay * tl.load(recomputed + i * BN * BD)
                h = decayed + (dt_t * x_t)[None, :] * B_t[:, None]
                if z is not None:
                    z_t = read(z, row * sz + d, real_D)
                    y_t = tl.sum(h * C_t[:, None], 0) + D_D * x_t
                    tl.store(gz + row * D + d, gy_t * y_t * silu_slope(z_t), mask=real_D)
                    gy_t *= z_t * tl.sigmoid(z_t)
                tl.store(gC + (share + row) * N + n, tl.sum(h * gy_t[None, :], 1), mask=real_N)
                gh += gy_t[None, :] * C_t[:, None]
                tl.store(gB + (share + row) * N + n, tl.sum(gh * (dt_t * x_t)[None, :], 1), mask=real_N)
                gxdt = tl.sum(gh * B_t[:, None], 0)
                flow = gh * decayed  # gradient of the exponent dt_t A
                gA_ND += flow * dt_t[None, :]
                gdt_t = (tl.sum(flow * A_ND, 0) / LOG2E + gxdt * x_t) * slope
                tl.store(gdt + row * D + d, gdt_t, mask=real_D)
                tl.store(gx + row * D + d, gxdt * dt_t + D_D * gy_t, mask=real_D)
                gskip_D += gy_t * x_t
                gbias_D += gdt_t
                gh *= decay
            tl.debug_barrier()
        if gstate is not None:
            tl.store(gstate + s * N * D + cell, gh, mask=real)
    tl.store(gA + program.to(tl.int64) * N * D + cell, gA_ND, mask=real)
    if gskip is not None:
        tl.store(gskip + program * D + d, gskip_D, mask=real_D)
    if gdt_bias is not None:
        tl.store(gdt_bias + program * D + d, gbias_D, mask=real_D)


@triton.jit
def scan_last_forward(
    x, sx, dt, sdt, A, B, sB, C, skip, z, dt_bias, offsets, y, after,
    rows, L, D, N, SOFTPLUS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y_last = C sum_t exp(A w_t) dt_t B_t x_t, with w_t the sum of the steps after t. Grid (S, D / BD).

    C [S, N] and z [S, D] are contiguous. Writes y [S, D], and w [rows, D] to ``after`` where it
    is given.
    """
    s = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BN)
    real_D, real_N = d < D, n < N
    real = real_N[:, None] & real_D[None, :]
    cell = n[:, None] * D + d[None, :]
    A_ND = _decay_rates(A, cell, real)
    C_N = read(C, s * N + n, real_N)
    w = tl.zeros((BD,), tl.float32)
    y_D = tl.zeros((BD,), tl.float32)
    begin, length = rows_of(offsets, s, L, rows)
    for t in range(0, length):
        row = begin + length - 1 - t
        x_t = read(x, row * sx + d, real_D)
        dt_t, _ = _step_size(dt + row * sdt, dt_bias, d, real_D, SOFTPLUS)
        CB_t = C_N * read(B, row * sB + n, real_N)
        if after is not None:
            tl.store(after + row * D + d, w, mask=real_D)
        y_D += dt_t * x_t * tl.sum(tl.exp2(w[None, :] * A_ND) * CB_t[:, None], 0)
        w += dt_t
    if length > 0:
        if skip is not None:
            x_t = read(x, (begin + length - 1) * sx + d, real_D)
            y_D += read(skip, d, real_D) * x_t
    if z is not None:
        z_D = read(z, s * D + d, real_D)
        y_D *= z_D * tl.sigmoid(z_D)
    tl.store(y + s * D + d, y_D, mask=real_D)


@triton.jit
def scan_last_backward(
    gy, after, x, sx, dt, sdt, A, B, sB, C, skip, z, dt_bias, offsets,
    gx, gdt, gA, gB, gC, gskip, gz, gdt_bias,
    rows, L, D, N, S, SOFTPLUS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid and shares as in :func:`scan_backward`, but for gC [D / BD, S, N] and gz [S, D].

    Term s of the sum decays over every step t > s, so the gradient of dt_t collects what was
    met before t.
    """
    program = tl.program_id(0)
    d, n = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BN)
    real_D, real_N = d < D, n < N
    real = real_N[:, None] & real_D[None, :]
    cell = n[:, None] * D + d[None, :]
    A_ND = _decay_rates(A, cell, real)
    share = tl.program_id(1).to(tl.int64)
    gA_ND = tl.zeros((BN, BD), tl.float32)
    gskip_D = tl.zeros((BD,), tl.float32)
    gbias_D = tl.zeros((BD,), tl.float32)
    D_D = tl.zeros((BD,), tl.float32)
    if skip is not None:
        D_D = read(skip, d, real_D)
    for sequence in range(program, S, tl.num_programs(0)):
        s = tl.full((), 1, tl.int64) * sequence
        C_N = read(C, s * N + n, real_N)
        gy_D = read(gy, s * D + d, real_D)
        z_D = tl.zeros((BD,), tl.float32)
        gz_D = gy_D
        if z is not None:
            z_D = read(z, s * D + d, real_D)
            gz_D = gy_D * silu_slope(z_D)
            gy_D *= z_D * tl.sigmoid(z_D)
        y_D = tl.zeros((BD,), tl.float32)
        before = tl.zeros((BD,), tl.float32)
        gC_ND = tl.zeros((BN, BD), tl.float32)
        begin, length = rows_of(offsets, s, L, rows)
        for t in range(0, length):
            row = begin + t
            x_t = read(x, row * sx + d, real_D)
            dt_t, slope = _step_size(dt + row * sdt, dt_bias, d, real_D, SOFTPLUS)
            B_t = read(B, row * sB + n, real_N)
            w = read(after, row * D + d, real_D)
            decay = tl.exp2(w[None, :] * A_ND)
            seen = tl.sum(decay * (C_N * B_t)[:, None], 0)  # y for each unit of dt x
            g = gy_D * dt_t * x_t
            gC_ND += g[None, :] * decay * B_t[:, None]
            gCB = g[None, :] * decay * C_N[:, None]
            tl.store(gB + (share * rows + row) * N + n, tl.sum(gCB, 1), mask=real_N)
            flow = gCB * B_t[:, None]  # gradient of the exponent A w_t
            gA_ND += flow * w[None, :]
            gx_t, gdt_t = gy_D * dt_t * seen, (gy_D * x_t * seen + before) * slope
            if t == length - 1:
                gx_t += D_D * gy_D
                gskip_D += gy_D * x_t
                y_D += D_D * x_t
            tl.store(gx + row * D + d, gx_t, mask=real_D)
            tl.store(gdt + row * D + d, gdt_t, mask=real_D)
            gbias_D += gdt_t
            y_D += dt_t * x_t * seen
            before += tl.sum(flow * A_ND, 0) / LOG2E
        tl.store(gC + (share * S + s) * N + n, tl.sum(gC_ND, 1), mask=real_N)
        if z is not None:
            tl.store(gz + s * D + d, gz_D * y_D, mask=real_D)
    tl.store(gA + program.to(tl.int64) * N * D + cell, gA_ND, mask=real)
    if gskip is not None:
        tl.store(gskip + program * D + d, gskip_D, mask=real_D)
    if gdt_bias is not None:
        tl.store(gdt_bias + program * D + d, gbias_D, mask=real_D)
