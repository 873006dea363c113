"""Triton kernels of SSD (Dao and Gu 2024, arXiv 2405.21060, section 6): matrices within a chunk, the state between.

    y_i = D x_i + exp(S_i) C_i h + sum_{j <= i} (C_i . B_j) exp(E_ij) dt_j x_j      E_ij = sum_{j < r <= i} dt_r A
    h' = exp(S_last) h + sum_j exp(E_last,j) dt_j B_j x_j^T                         S_i  = sum_{r <= i} dt_r A

A program walks one head of one sequence from chunk to chunk, Q positions each, with the state h
[BN, BP] in registers; all else of a chunk are small matrix products. A program that reads from
the end to the beginning (REVERSE) and writes one position further (SHIFT) is one half of the
quasiseparable mixer.

E is summed term by term (the "segsum" of the paper), never a difference of running sums, which
would lose its digits; so is, in the backward, the gradient of a step's decay. Rows behind the
end of a sequence have dt = 0: decay 1, input 0.

Letters as in :mod:`recbole_ssm.ops`; h is program_id(1), q positions i and j of a chunk, BN and
BP are N and P rounded up to powers of two. Products take float32 (PRECISION says how many of
its digits) and sum in float32.
"""

import triton
import triton.language as tl

from recbole_ssm.ops.triton.common import read, read_if_given, rows_of


@triton.jit
def _chunk(begin, length, c, q, REVERSE: tl.constexpr, Q: tl.constexpr):
    """The row of the chunk's first position, and how far from it all others [Q] lie: short distances fit 32 bits."""
    if REVERSE:
        return begin + length - 1 - c * Q, -q
    return begin + c * Q, q


@triton.jit
def _writing(length, of_piece, s, REVERSE: tl.constexpr, SHIFT: tl.constexpr):
    """How many positions of sequence s write a row. Where each writes one position further, the last one has none.

    Where s is a piece of a sequence and another follows, its last position writes into that one.
    """
    writing = length - SHIFT
    if SHIFT:
        if of_piece is not None:
            following = tl.load(of_piece + s - 1, mask=s > 0, other=-1) if REVERSE else tl.load(of_piece + s + 1)
            writing = tl.where(following == tl.load(of_piece + s), length, writing)
    return writing


@triton.jit
def _exponents(a_Q, q):
    """E [Q, Q] with zeros above its diagonal, and S [Q], of a = dt A [Q]."""
    later = q[:, None] > q[None, :]
    E = tl.cumsum(tl.where(later, a_Q[:, None], 0.0), 0)
    return E, tl.cumsum(a_Q, 0)


@triton.jit
def _last(v, q, Q: tl.constexpr):
    """The last row of v [Q, ...], where all positions behind the end repeat it."""
    return tl.sum(tl.where(q == Q - 1, v, 0.0), 0)


@triton.jit
def ssd_forward(
    x, sx, dt, sdt, A, B, sB, C, sC, skip, state, offsets, of_piece, y, final, kept,
    rows, L, H, P, N, per_group, REVERSE: tl.constexpr, SHIFT: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Grid (S, H). Writes y [rows, H, P] (or adds to it), and where given final [S, H, N, P] and the states at the
    start of every chunk but the first, kept [rows // Q, H, N, P].
    """  # fmt: skip
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    real_N, real_P = n < N, p < P
    cell, real_NP = n[:, None] * P + p[None, :], real_N[:, None] & real_P[None, :]
    A_h = tl.load(A + head).to(tl.float32)
    group = head // per_group
    h = read_if_given(state, (s * H + head) * N * P + cell, real_NP)
    begin, length = rows_of(offsets, s, L, rows)
    writing = _writing(length, of_piece, s, REVERSE, SHIFT)
    for c in range(0, tl.cdiv(length, Q)):
        if kept is not None:
            if c > 0:  # such rows are Q apart and more, so each has a place of its own
                tl.store(kept + (((begin + c * Q) // Q - 1) * H + head) * N * P + cell, h, mask=real_NP)
        k = c * Q + q
        first, at = _chunk(begin, length, c, q, REVERSE, Q)
        real = k < length
        real_QP, real_QN = real[:, None] & real_P[None, :], real[:, None] & real_N[None, :]
        x_QP = read(x + first * sx + head * P, at[:, None] * sx + p[None, :], real_QP)
        B_QN = read(B + first * sB + group * N, at[:, None] * sB + n[None, :], real_QN)
        C_QN = read(C + first * sC + group * N, at[:, None] * sC + n[None, :], real_QN)
        dt_Q = read(dt + first * sdt + head, at * sdt, real)
        E, S = _exponents(dt_Q * A_h, q)
        score = tl.dot(C_QN, tl.trans(B_QN), input_precision=PRECISION)
        M = tl.where(q[:, None] >= q[None, :], score * tl.exp(E) * dt_Q[None, :], 0.0)
        # A zero above the diagonal times what is not finite would be NaN at earlier positions.
        finite = tl.abs(x_QP) < float("inf")
        y_QP = tl.dot(M, tl.where(finite, x_QP, 0.0), input_precision=PRECISION)
        y_QP = tl.where(tl.cumsum(tl.where(finite, 0, 1), 0) > 0, float("nan"), y_QP)
        y_QP += tl.exp(S)[:, None] * tl.dot(C_QN, h, input_precision=PRECISION)
        if skip is not None:
            y_QP += tl.load(skip + head).to(tl.float32) * x_QP
        further = first - SHIFT if REVERSE else first + SHIFT
        out = y + (further * H + head) * P + (at[:, None] * H * P + p[None, :])
        real_out = (k < writing)[:, None] & real_P[None, :]
        if ADD:
            y_QP += tl.load(out, mask=real_out, other=0.0)
        tl.store(out, y_QP, mask=real_out)
        to_end = tl.exp(_last(E, q[:, None], Q)) * dt_Q
        added = tl.dot(tl.trans(B_QN * to_end[:, None]), x_QP, input_precision=PRECISION)
        h = tl.exp(_last(S, q, Q)) * h + added
    if final is not None:
        tl.store(final + (s * H + head) * N * P + cell, h, mask=real_NP)


@triton.jit
def ssd_added(
    x, sx, dt, sdt, A, B, sB, offsets, of_piece, added, steps,
    rows, L, H, P, N, per_group, BACKWARD: tl.constexpr, REVERSE: tl.constexpr, SHIFT: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """What a sequence adds to a state that passes it, added [S, H, N, P], and the sum of its dt_t, steps [S, H].

    BACKWARD, with gy for x and C for B: what it adds to the gradient of the state. Grid (S, H).
    """
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    real_N, real_P = n < N, p < P
    A_h = tl.load(A + head).to(tl.float32)
    group = head // per_group
    h = tl.zeros((BN, BP), tl.float32)
    passed = tl.full((), 0.0, tl.float32)
    begin, length = rows_of(offsets, s, L, rows)
    writing = _writing(length, of_piece, s, REVERSE, SHIFT)
    chunks = tl.cdiv(length, Q)
    for i in range(0, chunks):
        c = chunks - 1 - i if BACKWARD else i
        k = c * Q + q
        first, at = _chunk(begin, length, c, q, REVERSE, Q)
        real = k < length
        dt_Q = read(dt + first * sdt + head, at * sdt, real)
        a_Q = dt_Q * A_h
        if BACKWARD:
            first_x = first - SHIFT if REVERSE else first + SHIFT
            real_x = k < writing
            weight = tl.exp(tl.cumsum(a_Q, 0))
        else:
            first_x = first
            real_x = real
            weight = tl.exp(tl.sum(tl.where(q[:, None] > q[None, :], a_Q[:, None], 0.0), 0)) * dt_Q
        x_QP = read(x + first_x * sx + head * P, at[:, None] * sx + p[None, :], real_x[:, None] & real_P[None, :])
        B_QN = read(B + first * sB + group * N, at[:, None] * sB + n[None, :], real[:, None] & real_N[None, :])
        here = tl.dot(tl.trans(B_QN * weight[:, None]), x_QP, input_precision=PRECISION)
        h = tl.exp(tl.sum(a_Q, 0)) * h + here
        passed += tl.sum(dt_Q, 0)
    cell, real_NP = n[:, None] * P + p[None, :], real_N[:, None] & real_P[None, :]
    tl.store(added + (s * H + head) * N * P + cell, h, mask=real_NP)
    tl.store(steps + s * H + head, passed)


@triton.jit
def ssd_backward(
    gy, sgy, gfinal, x, sx, dt, sdt, A, B, sB, C, sC, skip, state, offsets, of_piece, kept,
    gx, gdt, gA, gB, gC, gskip, gstate,
    rows, L, H, P, N, per_group, REVERSE: tl.constexpr, SHIFT: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Grid (S, H); a program walks from the last chunk to the first, with the gradient gh [BN, BP] of the state.

    Writes gx [rows, H, P] (or adds to it), gdt [rows, H], gstate [S, H, N, P]; each head's
    share of gB and gC [rows, H, N]; each sequence's share of gA and gskip [S, H].
    """
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    real_N, real_P = n < N, p < P
    cell, real_NP = n[:, None] * P + p[None, :], real_N[:, None] & real_P[None, :]
    A_h = tl.load(A + head).to(tl.float32)
    group = head // per_group
    gh = read_if_given(gfinal, (s * H + head) * N * P + cell, real_NP)
    gA_h = tl.full((), 0.0, tl.float32)
    gskip_h = tl.full((), 0.0, tl.float32)
    begin, length = rows_of(offsets, s, L, rows)
    writing = _writing(length, of_piece, s, REVERSE, SHIFT)
    chunks = tl.cdiv(length, Q)
    for back in range(0, chunks):
        c = chunks - 1 - back
        if c > 0:
            h = read(kept, (((begin + c * Q) // Q - 1) * H + head) * N * P + cell, real_NP)
        else:
            h = read_if_given(state, (s * H + head) * N * P + cell, real_NP)
        k = c * Q + q
        first, at = _chunk(begin, length, c, q, REVERSE, Q)
        further = first - SHIFT if REVERSE else first + SHIFT
        real, real_out = k < length, (k < writing)[:, None] & real_P[None, :]
        real_QP, real_QN = real[:, None] & real_P[None, :], real[:, None] & real_N[None, :]
        x_QP = read(x + first * sx + head * P, at[:, None] * sx + p[None, :], real_QP)
        gy_QP = read(gy + further * sgy + head * P, at[:, None] * sgy + p[None, :], real_out)
        B_QN = read(B + first * sB + group * N, at[:, None] * sB + n[None, :], real_QN)
        C_QN = read(C + first * sC + group * N, at[:, None] * sC + n[None, :], real_QN)
        dt_Q = read(dt + first * sdt + head, at * sdt, real)
        E, S = _exponents(dt_Q * A_h, q)
        decay = tl.where(q[:, None] >= q[None, :], tl.exp(E), 0.0)
        start, to_end, whole = tl.exp(S), tl.exp(_last(E, q[:, None], Q)), tl.exp(_last(S, q, Q))
        score = tl.dot(C_QN, tl.trans(B_QN), input_precision=PRECISION)
        # v_j = dt_j x_j: what a position puts in
        gv_QP = tl.dot(tl.trans(score * decay), gy_QP, input_precision=PRECISION)
        Bgh_QP = to_end[:, None] * tl.dot(B_QN, gh, input_precision=PRECISION)
        gv_QP += Bgh_QP
        gx_QP = dt_Q[:, None] * gv_QP
        if skip is not None:
            gx_QP += tl.load(skip + head).to(tl.float32) * gy_QP
            gskip_h += tl.sum(tl.sum(gy_QP * x_QP, 1), 0)
        into = gx + (first * H + head) * P + (at[:, None] * H * P + p[None, :])
        if ADD:
            gx_QP += tl.load(into, mask=real_QP, other=0.0)
        tl.store(into, gx_QP, mask=real_QP)
        # C_i . B_j
        gscore = tl.dot(gy_QP, tl.trans(x_QP), input_precision=PRECISION) * decay * dt_Q[None, :]
        gC_QN = tl.dot(gscore, B_QN, input_precision=PRECISION)
        gyh_QN = tl.dot(gy_QP, tl.trans(h), input_precision=PRECISION)
        gC_QN += start[:, None] * gyh_QN
        gB_QN = tl.dot(tl.trans(gscore), C_QN, input_precision=PRECISION)
        gB_QN += (dt_Q * to_end)[:, None] * tl.dot(x_QP, tl.trans(gh), input_precision=PRECISION)
        share = (first * H + head) * N
        tl.store(gC + share + (at[:, None] * H * N + n[None, :]), gC_QN, mask=real_QN)
        tl.store(gB + share + (at[:, None] * H * N + n[None, :]), gB_QN, mask=real_QN)
        # The decay of step t passes on what went from j < t to i >= t, from the state before the chunk to i >= t, from
        # j < t to the state behind the chunk, and from state to state. Its gradient is the sum of these: no difference
        # of larger sums, and so no digits lost.
        from_j_to_i = tl.cumsum(tl.where(q[:, None] > q[None, :], gscore * score, 0.0), 0, reverse=True)
        from_j = dt_Q * tl.sum(x_QP * Bgh_QP, 1)
        to_i = tl.cumsum(start * tl.sum(C_QN * gyh_QN, 1), 0, reverse=True)
        passing_Q = tl.sum(tl.where(q[:, None] > q[None, :], from_j_to_i + from_j[None, :], 0.0), 1)
        passing_Q += to_i + whole * tl.sum(tl.sum(gh * h, 1), 0)
        tl.store(gdt + first * H + head + at * H, tl.sum(x_QP * gv_QP, 1) + A_h * passing_Q, mask=real)
        gA_h += tl.sum(dt_Q * passing_Q, 0)
        gh = whole * gh + tl.dot(tl.trans(C_QN * start[:, None]), gy_QP, input_precision=PRECISION)
    if gstate is not None:
        tl.store(gstate + (s * H + head) * N * P + cell, gh, mask=real_NP)
    tl.store(gA + s * H + head, gA_h)
    if gskip is not None:
        tl.store(gskip + s * H + head, gskip_h)


@triton.jit
def ssd_last_forward(
    x, sx, dt, sdt, A, B, sB, C, skip, offsets, y, after,
    rows, L, H, P, N, per_group, groups, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y_last = D x_last + sum_j (C . B_j) exp(w_j) dt_j x_j, with w_j the sum of dt A after j. Grid (S, H).

    C [S, G, N] is contiguous. Walks from the end; writes y [S, H, P], and w [rows, H] to
    ``after`` where it is given.
    """
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    real_N, real_P = n < N, p < P
    A_h = tl.load(A + head).to(tl.float32)
    group = head // per_group
    C_N = read(C, (s * groups + group) * N + n, real_N)
    y_P = tl.zeros((BP,), tl.float32)
    passed = tl.full((), 0.0, tl.float32)
    begin, length = rows_of(offsets, s, L, rows)
    for c in range(0, tl.cdiv(length, Q)):
        k = c * Q + q
        first, at = _chunk(begin, length, c, q, True, Q)
        real = k < length
        dt_after = read(dt + (first + 1) * sdt + head, at * sdt, real & (k > 0))
        w = passed + tl.cumsum(dt_after, 0) * A_h
        if after is not None:
            tl.store(after + first * H + head + at * H, w, mask=real)
        B_QN = read(B + first * sB + group * N, at[:, None] * sB + n[None, :], real[:, None] & real_N[None, :])
        x_QP = read(x + first * sx + head * P, at[:, None] * sx + p[None, :], real[:, None] & real_P[None, :])
        weight = tl.sum(B_QN * C_N[None, :], 1) * tl.exp(w) * read(dt + first * sdt + head, at * sdt, real)
        y_P += tl.sum(weight[:, None] * x_QP, 0)
        passed += tl.sum(dt_after, 0) * A_h
    if skip is not None:
        if length > 0:
            x_last = read(x, (begin + length - 1) * sx + head * P + p, real_P)
            y_P += tl.load(skip + head).to(tl.float32) * x_last
    tl.store(y + (s * H + head) * P + p, y_P, mask=real_P)


@triton.jit
def ssd_last_backward(
    gy, after, x, sx, dt, sdt, A, B, sB, C, skip, offsets,
    gx, gdt, gA, gB, gC, gskip,
    rows, L, H, P, N, per_group, groups, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Grid and shares as in :func:`ssd_backward`, but for gC [S, H, N].

    Term j of the sum decays over every step t > j, so the gradient of dt_t collects what was
    met before t.
    """
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    real_N, real_P = n < N, p < P
    A_h = tl.load(A + head).to(tl.float32)
    group = head // per_group
    C_N = read(C, (s * groups + group) * N + n, real_N)
    gy_P = read(gy, (s * H + head) * P + p, real_P)
    D_h = tl.full((), 0.0, tl.float32)
    if skip is not None:
        D_h = tl.load(skip + head).to(tl.float32)
    gC_N = tl.zeros((BN,), tl.float32)
    gA_h = tl.full((), 0.0, tl.float32)
    gskip_h = tl.full((), 0.0, tl.float32)
    before = tl.full((), 0.0, tl.float32)
    begin, length = rows_of(offsets, s, L, rows)
    for c in range(0, tl.cdiv(length, Q)):
        k = c * Q + q
        first, real = begin + c * Q, k < length
        real_QP, real_QN = real[:, None] & real_P[None, :], real[:, None] & real_N[None, :]
        dt_Q = read(dt + first * sdt + head, q * sdt, real)
        decay = tl.exp(read(after + first * H + head, q * H, real))
        B_QN = read(B + first * sB + group * N, q[:, None] * sB + n[None, :], real_QN)
        x_QP = read(x + first * sx + head * P, q[:, None] * sx + p[None, :], real_QP)
        score, gv = decay * tl.sum(B_QN * C_N[None, :], 1), tl.sum(x_QP * gy_P[None, :], 1)
        last = tl.where(k == length - 1, D_h, 0.0)
        gx_QP = (score * dt_Q + last)[:, None] * gy_P[None, :]
        tl.store(gx + (first * H + head) * P + (q[:, None] * H * P + p[None, :]), gx_QP, mask=real_QP)
        gscore = decay * dt_Q * gv
        gB_QN = gscore[:, None] * C_N[None, :]
        tl.store(gB + (first * H + head) * N + (q[:, None] * H * N + n[None, :]), gB_QN, mask=real_QN)
        gC_N += tl.sum(gscore[:, None] * B_QN, 0)
        term = score * dt_Q * gv
        passing_Q = before + tl.cumsum(term, 0) - term
        tl.store(gdt + first * H + head + q * H, score * gv + A_h * passing_Q, mask=real)
        gA_h += tl.sum(dt_Q * passing_Q, 0)
        gskip_h += tl.sum(tl.where(k == length - 1, gv, 0.0), 0)
        before += tl.sum(term, 0)
    tl.store(gC + (s * H + head) * N + n, gC_N, mask=real_N)
    tl.store(gA + s * H + head, gA_h)
    if gskip is not None:
        tl.store(gskip + s * H + head, gskip_h)
