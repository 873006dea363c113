"""The operators over right-padded batches in plain tensor operations, for graphs that run without this package.

There is no kernel of ours in them, no operator that loops, and no shape that depends on the lengths: a tracer such as
torch.export sees all of them, whatever the number of rows. They compute padding too, and keep it out of what is real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import force
from recbole_ssm.ops.numerics import step_size
from recbole_ssm.ops.quasiseparable import one_matrix
from recbole_ssm.ops.ssd import log_decay, matrix_form

PIECE = 8
"""Events that a scan takes one after the other."""


@contextmanager
def plain_operators(real_BL: Tensor) -> Iterator[None]:
    """Let the operators of layers compute in this way within a ``with`` block, from no state and on padded batches.

    Args:
        real_BL: False at the padding, which stands behind all events of a row. Causal operators never see it; the
            others take it for zeros.
    """
    real_BL1 = real_BL[..., None]

    def centered_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, _: Any, activation: str | None) -> Tensor:
        return _convolve(torch.where(real_BL1, x, 0.0), weight, bias, weight.shape[1] // 2, activation)

    def quasiseparable(x: Tensor, dt_fwd: Tensor, dt_bwd: Tensor, A_H: Tensor, *maps_and_bounds: Any) -> Tensor:
        # A step of size 0 is silent: decay 1, input 0. The other tensors come from the convolution.
        dt_fwd, dt_bwd = torch.where(real_BL1, dt_fwd, 0.0), torch.where(real_BL1, dt_bwd, 0.0)
        S_bwd = log_decay(dt_bwd.flip(1), A_H).flip(-1)
        return one_matrix(x, log_decay(dt_fwd, A_H), S_bwd, dt_fwd, dt_bwd, *maps_and_bounds[:-1])

    found: dict[str, Callable[..., Any]] = {
        "attention": _attention,
        "causal_conv1d": _causal_conv1d,
        "centered_conv1d": centered_conv1d,
        "selective_scan": _selective_scan,
        "ssd": _ssd,
        "quasiseparable": quasiseparable,
    }
    with ExitStack() as stack:
        for op, function in found.items():
            stack.enter_context(force(op, function))
        yield


def _attention(q_BLHP: Tensor, k_BLHP: Tensor, v_BLHP: Tensor, *_: Any) -> Tensor:
    """Causal, without dropout."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHP, k_BLHP, v_BLHP))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, lead: int, activation: str | None) -> Tensor:
    """Taps around each position, ``lead`` of them before it."""
    L, K = x.shape[1], weight.shape[1]
    x = F.pad(x, (0, 0, lead, K - 1 - lead))
    y = x[:, :L] * weight[:, 0]
    for k in range(1, K):
        y = y + x[:, k : k + L] * weight[:, k]
    y = y if bias is None else y + bias
    return F.silu(y) if activation == "silu" else y


def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, _: Any, activation: str | None
) -> tuple[Tensor, Tensor]:
    K = weight.shape[1]
    return _convolve(x, weight, bias, K - 1, activation), F.pad(x, (0, 0, K, 0))[:, -K:].transpose(1, 2)


def _selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    _: Any,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence within all pieces of the rows at once, then from piece to piece: PIECE + L / PIECE steps, of which
    none holds the states of all events.
    """
    dt = step_size("selective_scan", dt, dt_bias, dt_softplus)
    L, pieces = x.shape[1], -(-x.shape[1] // PIECE)
    # Steps of size 0 behind the rows leave the state as it is. [B, pieces, PIECE, ...]
    v, steps, B, C = (F.pad(t, (0, 0, 0, pieces * PIECE - L)).unflatten(1, (pieces, PIECE)) for t in (dt * x, dt, B, C))
    # Within the pieces, from a state of zeros. [B, pieces, D, N]
    h = v[:, :, 0, :, None] * B[:, :, 0, None]
    within = [_read(h, C[:, :, 0])]
    for q in range(1, PIECE):
        h = h * (steps[:, :, q, :, None] * A).exp() + v[:, :, q, :, None] * B[:, :, q, None]
        within.append(_read(h, C[:, :, q]))
    # What comes before each piece, and what is left of it at each event.
    since = steps.cumsum(2)
    whole = (since[:, :, -1, :, None] * A).exp()
    starts = [torch.zeros_like(h[:, 0])]
    for piece in range(pieces):
        starts.append(starts[-1] * whole[:, piece] + h[:, piece])
    start = torch.stack(starts[:-1], 1)
    before = [_read(start * (since[:, :, q, :, None] * A).exp(), C[:, :, q]) for q in range(PIECE)]
    y = (torch.stack(within, 2) + torch.stack(before, 2)).flatten(1, 2)[:, :L]
    y = y if D is None else y + D * x
    return (y if z is None else y * F.silu(z)), starts[-1]


def _read(h: Tensor, C: Tensor) -> Tensor:
    """h C: ``[..., D, N]`` and ``[..., N]`` -> ``[..., D]``."""
    return (h @ C[..., None])[..., 0]


def _ssd(
    x: Tensor,
    dt: Tensor,
    A_H: Tensor,
    B: Tensor,
    C: Tensor,
    D_H: Tensor | None,
    state: Tensor | None,
    _: Any,
    return_state: bool,
) -> tuple[Tensor, None]:
    y = matrix_form(x, dt, log_decay(dt, A_H), B, C)
    return (y if D_H is None else y + D_H[:, None] * x), None
