"""The selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752, equations 2a, 2b and 4).

h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t          one state of N for each channel
y_t = C_t h_t + D x_t,    then  y_t * SiLU(z_t)   where a gate z is given
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.backend import dispatch, implements
from recbole_ssm.ops.numerics import at_least_float32, decay_of, floor_of_exponent, step_size, without_autocast
from recbole_ssm.ops.packing import at_every_position, last_of, map_padded, map_sequences, segment_sum_after
from recbole_ssm.ops.table import check


def selective_scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None = None,
    z_BLD: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_BDN: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective scan over whole sequences.

    Args:
        x_BLD: input ``[B, L, D]``, or a packed batch ``[1, total, D]`` with ``cu_seqlens``.
        dt_BLD: step sizes; positive, once ``dt_bias`` ``[D]`` is added and, if ``dt_softplus``,
            softplus applied.
        A_DN: ``[D, N]``, negative.
        B_BLN, C_BLN: input and output maps ``[B, L, N]``.
        D_D: skip weights ``[D]`` or None.
        z_BLD: gate, applied by SiLU, or None.
        state_BDN: initial state ``[B, D, N]`` (packed: ``[S, D, N]``) or None for zeros.
        cu_seqlens: bounds ``[S + 1]`` of the packed sequences; the state starts again at each.

    Returns:
        y ``[B, L, D]`` in the dtype of x, and the final state, shaped as ``state_BDN``, in
        float32 or wider.

    Raises:
        ValueError: a shape or ``cu_seqlens`` does not fit.
    """
    tensors = (x_BLD, dt_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD, dt_bias, state_BDN, cu_seqlens)
    check("selective_scan", *tensors)
    y, final = dispatch("selective_scan", x_BLD)(*tensors, dt_softplus)
    return y, final


def selective_scan_last(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_SN: Tensor,
    D_D: Tensor | None = None,
    z_SD: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y of :func:`selective_scan` at the last position of each sequence only, exactly and for less.

    With T_t the sum of dt up to t, y_last = C sum_s exp(A (T_last - T_s)) dt_s B_s x_s: no
    recurrence, and C, D and z are needed at one position. Arguments are those of
    :func:`selective_scan`, but for C ``[S, N]`` and z ``[S, D]``.

    Returns:
        ``[S, D]`` (S = B for a padded batch); zeros for an empty packed sequence.

    Raises:
        ValueError: a shape or ``cu_seqlens`` does not fit.
    """
    tensors = (x_BLD, dt_BLD, A_DN, B_BLN, C_SN, D_D, z_SD, dt_bias, cu_seqlens)
    check("selective_scan_last", *tensors)
    y: Tensor = dispatch("selective_scan_last", x_BLD)(*tensors, dt_softplus)
    return y


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = torch.addcmul(y, x, D)
    return y if z is None else y * F.silu(z)


def _scan(recurrence: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation of either op from a recurrence on step sizes as they are."""

    @at_least_float32
    def scan(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        *rest: Any,
    ) -> Any:
        *state_and_bounds, dt_softplus = rest
        dt = step_size("selective_scan", dt, dt_bias, dt_softplus)
        return recurrence(x, dt, A, B, C, D, z, *state_and_bounds)

    return scan


# --- reference: the recurrence as it is written ---


@implements("selective_scan", "reference")
@_scan
def _reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[0], *A.shape) if state is None else state
        ys = []
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t, :, None] * A)
            h = decay * h + dt[:, t, :, None] * B[:, t, None] * x[:, t, :, None]
            ys.append((h * C[:, t, None]).sum(-1))  # [B, D]
        return (torch.stack(ys, 1) if ys else x), h

    y, final = map_sequences(one, (x, dt, B, C), state, cu_seqlens)
    return _skip_and_gate(y, x, D, z), final


@implements("selective_scan_last", "reference")
def _last_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    C = at_every_position(C, x.shape[1], cu_seqlens)
    z = None if z is None else at_every_position(z, x.shape[1], cu_seqlens)
    y, _ = _reference(x, dt, A, B, C, D, z, dt_bias, None, cu_seqlens, dt_softplus)
    return last_of(y, cu_seqlens)


# --- torch: a loop over time on tiles of rows whose state stays in the cache ---

TILE = 1 << 17  # elements of one tile's state or decay: half a MiB in float32
CHUNK = 16  # steps whose states the backward holds at once


class _Scan(torch.autograd.Function):
    """The recurrence on a padded batch, with its gradient written out.

    The forward keeps the state at every CHUNK-th step; the backward recomputes those between,
    so that memory grows with L / CHUNK and each pass works on one tile. States stand as ``[b,
    N, D]``: products with B and C then run along contiguous channels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A_ND: Tensor, B: Tensor, C: Tensor, h0_BND: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, L, _ = x.shape
        y, final, kept = torch.empty_like(x), torch.empty_like(h0_BND), []
        for rows in _tiles(batch, A_ND.numel()):
            h, xdt = h0_BND[rows].clone(), x[rows] * dt[rows]
            decay = torch.empty_like(h)
            kept.append([h.clone()])
            for t in range(L):
                if t and t % CHUNK == 0:
                    kept[-1].append(h.clone())
                _decay(dt[rows, t, None], A_ND, decay)
                h.mul_(decay).addcmul_(xdt[:, t, None], B[rows, t, :, None])
                y[rows, t, None] = torch.bmm(C[rows, t, None], h)
            final[rows] = h
        ctx.save_for_backward(x, dt, A_ND, B, C)
        ctx.kept = kept
        return y, final

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, dt, A_ND, B, C = ctx.saved_tensors
        gy, gfinal = grads
        batch, L, _ = x.shape
        gx, gdt, gB, gC = (torch.empty_like(t) for t in (x, dt, B, C))
        gA, gh0 = torch.zeros_like(A_ND), torch.empty_like(gfinal)
        for rows, kept in zip(_tiles(batch, A_ND.numel()), ctx.kept):
            gh, xdt = gfinal[rows].clone(), x[rows] * dt[rows]
            flow, product = torch.empty_like(gh), torch.empty_like(gh)
            decays, states = gh.new_empty(CHUNK, *gh.shape), gh.new_empty(CHUNK + 1, *gh.shape)
            for begin, state in reversed(list(zip(range(0, max(L, 1), CHUNK), kept))):
                steps = list(enumerate(range(begin, min(begin + CHUNK, L))))
                states[0] = state
                for i, t in steps:
                    _decay(dt[rows, t, None], A_ND, decays[i])
                    torch.mul(states[i], decays[i], out=states[i + 1])
                    states[i + 1].addcmul_(xdt[:, t, None], B[rows, t, :, None])
                for i, t in reversed(steps):
                    gh.addcmul_(gy[rows, t, None], C[rows, t, :, None])
                    gC[rows, t, :, None] = torch.bmm(states[i + 1], gy[rows, t, :, None])
                    gB[rows, t, :, None] = torch.bmm(gh, xdt[:, t, :, None])
                    gxdt = torch.bmm(B[rows, t, None], gh).squeeze(1)
                    gh.mul_(decays[i])
                    torch.mul(gh, states[i], out=flow)  # gradient of the exponent dt_t A
                    gA += torch.mul(flow, dt[rows, t, None], out=product).sum(0)
                    gdt[rows, t] = flow.mul_(A_ND).sum(1).addcmul_(gxdt, x[rows, t])
                    gx[rows, t] = gxdt * dt[rows, t]
            gh0[rows] = gh
        return gx, gdt, gA, gB, gC, gh0


class _ScanLast(torch.autograd.Function):
    """y_last = C sum_s exp(A w_s) B_s v_s with w_s = T_last - T_s, v_s = dt_s x_s, summed over s.

    One exponential an element and no recurrence; tiles of tokens stay in the cache, forward and
    backward.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, w: Tensor, A_ND: Tensor, CB: Tensor) -> Tensor:
        ctx.save_for_backward(v, w, A_ND, CB)
        y, buffer = torch.empty_like(v), _buffer(v, A_ND)
        for tokens in _tiles(len(v), A_ND.numel()):
            decay = _decay(w[tokens, None], A_ND, buffer[: len(w[tokens])])  # [tokens, N, D]
            y[tokens, None] = torch.bmm(CB[tokens, None], decay)
        return y.mul_(v)  # contribution of each token, [total, D]

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        v, w, A_ND, CB = ctx.saved_tensors
        gv, gw, gCB, gA = torch.empty_like(v), torch.empty_like(w), torch.empty_like(CB), torch.zeros_like(A_ND)
        gy_v, w_gy_v = grads[0] * v, grads[0] * v * w
        buffer, product = _buffer(v, A_ND), _buffer(v, A_ND)
        for tokens in _tiles(len(v), A_ND.numel()):
            decay = _decay(w[tokens, None], A_ND, buffer[: len(w[tokens])])
            gv[tokens, None] = torch.bmm(CB[tokens, None], decay)
            gCB[tokens, :, None] = torch.bmm(decay, gy_v[tokens, :, None])
            decay.mul_(CB[tokens, :, None])  # times gy v: the gradient of the exponent w_s A
            gA += torch.mul(decay, w_gy_v[tokens, None], out=product[: len(decay)]).sum(0)
            gw[tokens] = decay.mul_(A_ND).sum(1).mul_(gy_v[tokens])
        return gv.mul_(grads[0]), gw, gA, gCB


def _decay(dt: Tensor, A_ND: Tensor, out: Tensor) -> Tensor:
    """exp(dt A) ``[b, N, D]`` into ``out``."""
    return torch.mul(dt, A_ND, out=out).clamp_(min=floor_of_exponent(out.dtype)).exp_()


def _buffer(rows: Tensor, A_ND: Tensor) -> Tensor:
    """Room for one tile ``[b, N, D]``: a fresh temporary for each operation would cost more than the operation."""
    return rows.new_empty(min(len(rows), max(1, TILE // A_ND.numel())), *A_ND.shape)


def _tiles(batch: int, row_size: int) -> list[slice]:
    size = max(1, TILE // row_size)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _scan_padded(
    x: Tensor, B: Tensor, C: Tensor, dt: Tensor, state: Tensor | None, A_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """Scan a padded batch; ``state`` and the final state are ``[B, N, D]``.

    A loop over L steps starves on few rows. So a long and narrow batch is cut into pieces that
    run side by side: a first scan finds what each piece adds to the state, a short loop carries
    the states over the pieces, and a second scan starts each piece from its own.
    """
    batch, L, D = x.shape
    h0 = x.new_zeros(batch, *A_ND.shape) if state is None else state
    pieces = min(L // 64, TILE // max(batch * A_ND.numel(), 1))
    if pieces < 4:
        y, final = _Scan.apply(x, dt, A_ND, B, C, h0)
        return y, final
    size = -(-L // pieces)
    x, dt, B, C = (F.pad(t, (0, 0, 0, size * pieces - L)).reshape(batch * pieces, size, -1) for t in (x, dt, B, C))
    _, added = _Scan.apply(x, dt, A_ND, B, C, x.new_zeros(batch * pieces, *A_ND.shape))
    added = added.reshape(batch, pieces, *A_ND.shape)
    decay = decay_of(dt.sum(1)[:, None] * A_ND).reshape(added.shape)
    starts = [h0]
    for piece in range(pieces - 1):
        starts.append(decay[:, piece] * starts[-1] + added[:, piece])
    y, ends = _Scan.apply(x, dt, A_ND, B, C, torch.stack(starts, 1).flatten(0, 1))
    return y.reshape(batch, size * pieces, D)[:, :L], ends.reshape(batch, pieces, *A_ND.shape)[:, -1]


@implements("selective_scan", "torch")
@_scan
def _torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    A_ND = A.t().contiguous()
    state_BND = None if state is None else state.transpose(1, 2).contiguous()
    scan = functools.partial(_scan_padded, A_ND=A_ND)
    y, final = map_padded(scan, (x, B, C, dt), state_BND, cu_seqlens)
    return _skip_and_gate(y, x, D, z), final.transpose(1, 2)


@implements("selective_scan_last", "torch")
@_scan
def _last_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    batch, L, _ = x.shape
    if cu_seqlens is None:
        # the sum of the steps after each
        w = (dt.flip(1).cumsum(1).flip(1) - dt).flatten(0, 1)
        sequence = torch.arange(batch, device=x.device).repeat_interleave(L)
    else:
        w = segment_sum_after(dt[0], cu_seqlens)
        sequence = torch.arange(len(C), device=x.device).repeat_interleave(cu_seqlens.diff())
    v, CB = (x * dt).flatten(0, 1), B.flatten(0, 1) * C[sequence]
    terms = _ScanLast.apply(v, w, A.t().contiguous(), CB)
    y = x.new_zeros(len(C), x.shape[2]).index_add(0, sequence, terms)
    return _skip_and_gate(y, last_of(x, cu_seqlens), D, z)
