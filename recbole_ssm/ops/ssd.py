"""State space duality, the scan of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, sections 3, 6 and 7).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T       one state [P, N] for each head, one decay for the whole head
    y_t = h_t C_t + D x_t

As a matrix (equation 3 of the paper):

    y = M x        M_ts = (C_t . B_s) exp(sum_{s < r <= t} dt_r A) dt_s  for s <= t
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import dispatch, implements
from recbole_ssm.ops.numerics import at_least_float32, decay_of, step_size
from recbole_ssm.ops.packing import at_every_position, last_of, map_padded, map_sequences, segment_sum_after
from recbole_ssm.ops.table import check


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_BHPN: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """SSD over whole sequences.

    Args:
        x_BLHP: input ``[B, L, H, P]``, or a packed batch ``[1, total, H, P]`` with
            ``cu_seqlens``.
        dt_BLH: step sizes; positive, once ``dt_bias`` ``[H]`` is added and, if ``dt_softplus``,
            softplus applied.
        A_H: ``[H]``, negative.
        B_BLGN, C_BLGN: input and output maps of G groups of heads; G divides H.
        D_H: skip weights ``[H]`` or None.
        state_BHPN: initial state ``[B, H, P, N]`` (packed: ``[S, H, P, N]``) or None for zeros.
        cu_seqlens: bounds ``[S + 1]`` of the packed sequences; the state starts again at each.
        return_state: whether the final state is wanted; of short sequences it is a good part of
            the work.

    Returns:
        y ``[B, L, H, P]`` in the dtype of x, and the final state (shape as ``state_BHPN``) in
        float32 or wider, or None.

    Raises:
        ValueError: a shape or ``cu_seqlens`` does not fit, or G does not divide H.
    """
    rest = (A_H, B_BLGN, C_BLGN, D_H, state_BHPN, cu_seqlens)
    check("ssd", x_BLHP, dt_BLH, *rest)
    dt = step_size("ssd", dt_BLH, dt_bias, dt_softplus)
    y, final = dispatch("ssd", x_BLHP)(x_BLHP, dt, *rest, return_state)
    return y, final


def ssd_last(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_SGN: Tensor,
    D_H: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y of :func:`ssd` at the last position of each sequence only.

    It is the last row of M: one query of linear attention.

    Arguments are those of :func:`ssd`, but for C ``[S, G, N]`` (S = B for a padded batch).

    Returns:
        ``[S, H, P]``; zeros for an empty packed sequence.

    Raises:
        ValueError: a shape or ``cu_seqlens`` does not fit, or G does not divide H.
    """
    rest = (A_H, B_BLGN, C_SGN, D_H, cu_seqlens)
    check("ssd_last", x_BLHP, dt_BLH, *rest)
    dt = step_size("ssd_last", dt_BLH, dt_bias, dt_softplus)
    y: Tensor = dispatch("ssd_last", x_BLHP)(x_BLHP, dt, *rest)
    return y


def _skip(y: Tensor, x: Tensor, D_H: Tensor | None) -> Tensor:
    """y + D x, with one weight a head."""
    return y if D_H is None else torch.addcmul(y, x, D_H[:, None])


# --- reference: the recurrence as it is written ---


@implements("ssd", "reference")
@at_least_float32
def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`ssd` by a loop over time, from step sizes as they are."""
    H = x.shape[2]
    B, C = (t.repeat_interleave(H // t.shape[2], 2) for t in (B, C))  # [B, L, H, N]

    def one(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[0], H, x.shape[3], B.shape[3]) if state is None else state
        ys = []
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t] * A)[..., None, None]
            h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            ys.append((h * C[:, t, :, None]).sum(-1))  # [B, H, P]
        return (torch.stack(ys, 1) if ys else x), h

    y, final = map_sequences(one, (x, dt, B, C), state, cu_seqlens)
    return _skip(y, x, D), final if return_state else None


@implements("ssd_last", "reference")
@at_least_float32
def _last_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    C = at_every_position(C, x.shape[1], cu_seqlens)
    y, _ = reference(x, dt, A, B, C, D, None, cu_seqlens, False)
    return last_of(y, cu_seqlens)


# --- torch: the matrix form within chunks, the recurrence between them ---

ONE_CHUNK = 160  # up to this length the whole matrix is cheaper than chunks and the states between them
CHUNK = 64
TILE = 1 << 18  # elements of the matrices that are worked on at once


def log_decay(dt_BLH: Tensor, A_H: Tensor) -> Tensor:
    """Running sum of dt A, ``[B, H, L]``, in float64: it serves for its differences, and float32 would lose them."""
    return (dt_BLH.double() * A_H.double()).cumsum(1).transpose(1, 2)


def scores(C_BLGN: Tensor, B_BLGN: Tensor) -> Tensor:
    """C_t . B_s, ``[B, G, L, L]``."""
    return C_BLGN.transpose(1, 2) @ B_BLGN.permute(0, 2, 3, 1)


def heads(x_BGLL: Tensor, H: int) -> Tensor:
    """Spread the groups over their heads, ``[B, H, L, L]``; one group broadcasts as it is."""
    G = x_BGLL.shape[1]
    return x_BGLL if G in (1, H) else x_BGLL.repeat_interleave(H // G, 1)


def matrix_form(x: Tensor, dt: Tensor, S: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y = M x of one chunk ``[b, Q, H, P]`` that starts from a zero state."""
    H = x.shape[2]
    decay = decay_of((S[..., :, None] - S[..., None, :]).to(x.dtype))  # [b, H, Q, Q]
    v = (x * dt[..., None]).transpose(1, 2)  # [b, H, Q, P]
    M = (heads(scores(C, B), H) * decay).tril()
    # A zero above the diagonal times what is not finite would be NaN at earlier positions.
    finite = v.isfinite()
    y = M @ torch.where(finite, v, 0.0)
    return torch.where((~finite).cumsum(2) > 0, torch.nan, y).transpose(1, 2)


def tiled(function: Callable[..., Tensor], elements_per_row: int, *tensors: Tensor) -> Tensor:
    """``function(*tensors)`` a few rows at a time, so that its temporaries stay in the cache."""
    rows = max(1, TILE // max(1, elements_per_row))
    if len(tensors[0]) <= rows:
        return function(*tensors)
    return torch.cat([function(*tile) for tile in zip(*[t.split(rows) for t in tensors])])


def ssd_padded(
    x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A_H: Tensor, state: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """SSD of a padded batch ``[b, L, ...]`` (listing 1 of the paper), with the final state ``[b, H, P, N]`` or None."""
    batch, L, H, P = x.shape
    G, N = B.shape[2:]
    if L == 0:
        start = x.new_zeros(batch, H, P, N) if state is None else state
        return x, start if return_state else None
    Q = L if L <= ONE_CHUNK else CHUNK
    chunks = -(-L // Q)
    if chunks * Q > L:
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, chunks * Q - L)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, chunks * Q - L))
    x, B, C, dt = (t.reshape(batch * chunks, Q, *t.shape[2:]) for t in (x, B, C, dt))
    S = log_decay(dt, A_H)  # [b c, H, Q]
    # 1. within each chunk, from a zero state
    y = tiled(matrix_form, H * Q * Q, x, dt, S, B, C)
    if chunks == 1 and state is None and not return_state:
        return y, None
    # 2. what each chunk adds to the state by its end
    to_end = decay_of((S[..., -1:] - S).to(x.dtype)).transpose(1, 2) * dt  # [b c, Q, H]
    added = (x * to_end[..., None]).reshape(batch * chunks, Q, G, (H // G) * P).permute(0, 2, 3, 1) @ B.transpose(1, 2)
    added = added.reshape(batch, chunks, H, P, N)
    # 3. the state at the start of each chunk
    whole = decay_of(S[..., -1].to(x.dtype)).reshape(batch, chunks, H, 1, 1)
    starts = [x.new_zeros(batch, H, P, N) if state is None else state]
    for c in range(chunks):
        starts.append(torch.addcmul(added[:, c], whole[:, c], starts[-1]))
    # 4. what that state gives within the chunk
    if chunks > 1 or state is not None:
        start = torch.stack(starts[:-1], 1).reshape(batch * chunks, G, (H // G) * P, N)
        given = C.transpose(1, 2) @ start.transpose(2, 3)  # [b c, G, Q, (H / G) P]
        given = given.reshape(batch * chunks, G, Q, H // G, P).permute(0, 2, 1, 3, 4).reshape(x.shape)
        y = torch.addcmul(y, given, decay_of(S.to(x.dtype)).transpose(1, 2)[..., None])
    return y.reshape(batch, chunks * Q, H, P)[:, :L], starts[-1] if return_state else None


@implements("ssd", "torch")
@at_least_float32
def torch_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`ssd` on any device and in any precision, from step sizes as they are."""

    def padded(x: Tensor, B: Tensor, C: Tensor, dt: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return ssd_padded(x, B, C, dt, A, state, return_state)

    y, final = map_padded(padded, (x, B, C, dt), state, cu_seqlens)
    return _skip(y, x, D), final


@implements("ssd_last", "torch")
@at_least_float32
def torch_ssd_last(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """:func:`ssd_last` on any device and in any precision, from step sizes as they are."""
    batch, L, H, P = x.shape
    x_last = last_of(x, cu_seqlens)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=x.device) * L
    sequence = torch.arange(len(C), device=x.device).repeat_interleave(cu_seqlens.diff())
    x, dt, B = x.flatten(0, 1), dt.flatten(0, 1), B.flatten(0, 1)
    weight = decay_of(segment_sum_after(dt * A, cu_seqlens)) * dt  # [total, H]
    score = (B * C[sequence]).sum(-1).repeat_interleave(H // B.shape[1], 1)  # [total, H]
    y = x * (weight * score)[..., None]
    return _skip(x.new_zeros(len(C), H, P).index_add(0, sequence, y), x_last, D)
