"""Triton kernels of the selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = (C_t h_t + D x_t) SiLU(z_t).

A program carries the states of BD channels ``[BN, BD]`` through time in its registers: with one
warp, a lane holds one channel and all its N states, so a step needs no exchange between lanes
but for the sums over channels. Nothing but inputs, outputs, and one state every CHUNK steps
touches memory. What a step needs is read during the step before, as it lies in memory, and made
float32 where it is used: so memory answers while a program computes.

Letters as in :mod:`recbole_ssm.ops`. ``x, sx`` is a tensor and the stride of its rows; A is [N,
D], as the states; BN and BD are N and a share of D, rounded up to powers of two.
"""

import triton
import triton.language as tl

from recbole_ssm.ops.triton.common import LOG2E, read, read_if_given, rows_of, silu_slope, softplus


@triton.jit
def _step_size(dt_t, SOFTPLUS: tl.constexpr):
    """dt_t [BD] as the recurrence uses it, and the derivative of that by dt as given, its bias added."""
    slope = tl.full(dt_t.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = tl.sigmoid(dt_t)
        dt_t = softplus(dt_t)
    return dt_t, slope


@triton.jit
def _inputs(row, begin, length, x, sx, dt, sdt, B, sB, C, sC, z, sz, d, n, real_D, real_N):
    """x, dt, B, C and z at a row of a sequence, as they lie in memory; zeros at other rows.

    Where C or z is None, B or x stands for it.
    """
    inside = (row >= begin) & (row < begin + length)
    real_D, real_N = tl.where(inside, real_D, False), tl.where(inside, real_N, False)
    x_t = tl.load(x + row * sx + d, mask=real_D, other=0.0)
    dt_t = tl.load(dt + row * sdt + d, mask=real_D, other=0.0)
    B_t = tl.load(B + row * sB + n, mask=real_N, other=0.0)
    C_t = B_t
    if C is not None:
        C_t = tl.load(C + row * sC + n, mask=real_N, other=0.0)
    z_t = x_t
    if z is not None:
        z_t = tl.load(z + row * sz + d, mask=real_D, other=0.0)
    return x_t, dt_t, B_t, C_t, z_t


@triton.jit
def _decay_rates(A, cell, real):
    """A [BN, BD] times log2(e)."""
    return read(A, cell, real) * LOG2E


@triton.jit
def scan_forward(
    x, sx, dt, sdt, A, B, sB, C, sC, skip, z, sz, dt_bias, state, offsets, y, final, kept,
    rows, L, D, N, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (S, D / BD). Writes y [rows, D] and, where given, final [S, N, D] and kept [rows // CHUNK, N, D]."""
    s = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BN)
    real_D, real_N = d < D, n < N
    real = real_N[:, None] & real_D[None, :]
    cell = n[:, None] * D + d[None, :]  # within a state [N, D]
    A_ND = _decay_rates(A, cell, real)
    bias_D, D_D = read_if_given(dt_bias, d, real_D), read_if_given(skip, d, real_D)
    h = read_if_given(state, s * N * D + cell, real)
    begin, length = rows_of(offsets, s, L, rows)
    next_x, next_dt, next_B, next_C, next_z = _inputs(
        begin, begin, length, x, sx, dt, sdt, B, sB, C, sC, z, sz, d, n, real_D, real_N
    )
    for t in range(0, length):
        row = begin + t
        if kept is not None:
            if (t > 0) & (t % CHUNK == 0):  # such rows are CHUNK apart and more, so each has a place of its own
                tl.store(kept + (row // CHUNK - 1) * N * D + cell, h, mask=real)
        x_t, B_t, C_t = next_x.to(tl.float32), next_B.to(tl.float32), next_C.to(tl.float32)
        dt_t, _ = _step_size(next_dt.to(tl.float32) + bias_D, SOFTPLUS)
        z_t = next_z.to(tl.float32)
        next_x, next_dt, next_B, next_C, next_z = _inputs(
            row + 1, begin, length, x, sx, dt, sdt, B, sB, C, sC, z, sz, d, n, real_D, real_N
        )
        h = tl.exp2(dt_t[None, :] * A_ND) * h + (dt_t * x_t)[None, :] * B_t[:, None]
        y_t = tl.sum(h * C_t[:, None], 0) + D_D * x_t
        if z is not None:
            y_t *= z_t * tl.sigmoid(z_t)
        tl.store(y + row * D + d, y_t, mask=real_D)
    if final is not None:
        tl.store(final + s * N * D + cell, h, mask=real)


@triton.jit
def scan_added(
    x, sx, dt, sdt, A, B, sB, z, sz, dt_bias, offsets, added, steps,
    rows, L, D, N, BACKWARD: tl.constexpr, SOFTPLUS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What a sequence adds to a state that passes it, added [S, N, D], and the sum of its dt_t, steps [S, D].

    BACKWARD, with gy for x and C for B: what it adds to the gradient of the state. Grid (S, D / BD).
    """
    s = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BN)
    real_D, real_N = d < D, n < N
    real = real_N[:, None] & real_D[None, :]
    cell = n[:, None] * D + d[None, :]
    A_ND = _decay_rates(A, cell, real)
    bias_D = read_if_given(dt_bias, d, real_D)
    h = tl.zeros((BN, BD), tl.float32)
    passed = tl.zeros((BD,), tl.float32)
    begin, length = rows_of(offsets, s, L, rows)
    row = begin + length - 1 if BACKWARD else begin
    next_x, next_dt, next_B, _, next_z = _inputs(
        row, begin, length, x, sx, dt, sdt, B, sB, None, 0, z, sz, d, n, real_D, real_N
    )
    for _t in range(0, length):
        x_t, B_t, z_t = next_x.to(tl.float32), next_B.to(tl.float32), next_z.to(tl.float32)
        dt_t, _ = _step_size(next_dt.to(tl.float32) + bias_D, SOFTPLUS)
        row += -1 if BACKWARD else 1
        next_x, next_dt, next_B, _, next_z = _inputs(
            row, begin, length, x, sx, dt, sdt, B, sB, None, 0, z, sz, d, n, real_D, real_N
        )
        decay = tl.exp2(dt_t[None, :] * A_ND)
        if BACKWARD:
            if z is not None:
                x_t *= z_t * tl.sigmoid(z_t)
            h = decay * (h + x_t[None, :] * B_t[:, None])
        else:
            h = decay * h + (dt_t * x_t)[None, :] * B_t[:, None]
        passed += dt_t
    tl.store(added + s * N * D + cell, h, mask=real)
    tl.store(steps + s * D + d, passed, mask=real_D)


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
    bias_D, D_D = read_if_given(dt_bias, d, real_D), read_if_given(skip, d, real_D)
    for sequence in range(program, S, tl.num_programs(0)):
        s = tl.full((), 1, tl.int64) * sequence
        gh = read_if_given(gfinal, s * N * D + cell, real)
        begin, length = rows_of(offsets, s, L, rows)
        chunks = tl.cdiv(length, CHUNK)
        for c in range(0, chunks):
            first = (chunks - 1 - c) * CHUNK
            steps = tl.minimum(CHUNK, length - first)
            if first > 0:
                h = read(kept, ((begin + first) // CHUNK - 1) * N * D + cell, real)
            else:
                h = read_if_given(state, s * N * D + cell, real)
            row = begin + first
            next_x, next_dt, next_B, _, _ = _inputs(
                row, begin, length, x, sx, dt, sdt, B, sB, None, 0, None, 0, d, n, real_D, real_N
            )
            for i in range(0, steps):  # the state before each step of the chunk
                tl.store(recomputed + i * BN * BD, h)
                x_t, B_t = next_x.to(tl.float32), next_B.to(tl.float32)
                dt_t, _ = _step_size(next_dt.to(tl.float32) + bias_D, SOFTPLUS)
                next_x, next_dt, next_B, _, _ = _inputs(
                    row + i + 1, begin, length, x, sx, dt, sdt, B, sB, None, 0, None, 0, d, n, real_D, real_N
                )
                h = tl.exp2(dt_t[None, :] * A_ND) * h + (dt_t * x_t)[None, :] * B_t[:, None]
            tl.debug_barrier()
            row = begin + first + steps - 1
            next_x, next_dt, next_B, next_C, next_z = _inputs(
                row, begin, length, x, sx, dt, sdt, B, sB, C, sC, z, sz, d, n, real_D, real_N
            )
            next_gy = tl.load(gy + row * sgy + d, mask=real_D, other=0.0)
            for j in range(0, steps):
                i = steps - 1 - j
                row = begin + first + i
                x_t, B_t, C_t = next_x.to(tl.float32), next_B.to(tl.float32), next_C.to(tl.float32)
                dt_t, slope = _step_size(next_dt.to(tl.float32) + bias_D, SOFTPLUS)
                z_t, gy_t = next_z.to(tl.float32), next_gy.to(tl.float32)
                next_x, next_dt, next_B, next_C, next_z = _inputs(
                    row - 1, begin, length, x, sx, dt, sdt, B, sB, C, sC, z, sz, d, n, real_D, real_N
                )
                next_gy = tl.load(gy + (row - 1) * sgy + d, mask=tl.where(row > begin, real_D, False), other=0.0)
                decay = tl.exp2(dt_t[None, :] * A_ND)
                decayed = decay * tl.load(recomputed + i * BN * BD)
                h = decayed + (dt_t * x_t)[None, :] * B_t[:, None]
                if z is not None:
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
    bias_D = read_if_given(dt_bias, d, real_D)
    C_N = read(C, s * N + n, real_N)
    w = tl.zeros((BD,), tl.float32)
    y_D = tl.zeros((BD,), tl.float32)
    begin, length = rows_of(offsets, s, L, rows)
    for t in range(0, length):
        row = begin + length - 1 - t
        x_t = read(x, row * sx + d, real_D)
        dt_t, _ = _step_size(read(dt + row * sdt, d, real_D) + bias_D, SOFTPLUS)
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
    bias_D, D_D = read_if_given(dt_bias, d, real_D), read_if_given(skip, d, real_D)
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
            dt_t, slope = _step_size(read(dt + row * sdt, d, real_D) + bias_D, SOFTPLUS)
            B_t = read(B, row * sB + n, real_N)
            w = read(after, row * D + d, real_D)
            decay = tl.exp2(w[None, :] * A_ND)
            seen = tl.sum(decay * (C_N * B_t)[:, None], 0)  # y for each unit of dt x
            g = gy_D * dt_t * x_t
            gC_ND += g[None, :] * decay * B_t[:, None]
            gCB = g[None, :] * decay * C_N[:, None]
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
            # Last of all: sums over channels take many registers, and by now little else does.
            tl.store(gB + (share * rows + row) * N + n, tl.sum(gCB, 1), mask=real_N)
        tl.store(gC + (share * S + s) * N + n, tl.sum(gC_ND, 1), mask=real_N)
        if z is not None:
            tl.store(gz + s * D + d, gz_D * y_D, mask=real_D)
    tl.store(gA + program.to(tl.int64) * N * D + cell, gA_ND, mask=real)
    if gskip is not None:
        tl.store(gskip + program * D + d, gskip_D, mask=real_D)
    if gdt_bias is not None:
        tl.store(gdt_bias + program * D + d, gbias_D, mask=real_D)
