"""Short depthwise convolutions along time: causal (Mamba, Mamba-2) and centred (Hydra).

    causal:   y_t = act( b + sum_k w_k x_{t-K+1+k} )         w_{K-1} meets the present
    centred:  y_t = act( b + sum_k w_k x_{t-K//2+k} )        odd K; w_{K//2} meets the present

Inputs before the first and after the last position of a sequence are zero, or come from the
carried state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.backend import dispatch, implements
from recbole_ssm.ops.packing import map_sequences, positions_of
from recbole_ssm.ops.table import check


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = None,
    state_BDK: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution with bias and activation.

    Args:
        x_BLD: input ``[B, L, D]``, or a packed batch ``[1, total, D]`` with ``cu_seqlens``.
        weight_DK: filter taps ``[D, K]``, oldest first.
        bias_D: ``[D]`` or None.
        activation: ``"silu"`` or None.
        state_BDK: the last K inputs of what came before ``[B, D, K]`` (packed: ``[S, D, K]``),
            newest last; None for zeros. The oldest of the K is never read again; it is carried
            so that a step is one shift and one product.
        cu_seqlens: bounds ``[S + 1]`` of the packed sequences.

    Returns:
        y ``[B, L, D]`` and the state after the last position ``[B, D, K]``, both of x's type,
        whatever that of the weights is.

    Raises:
        ValueError: a shape or ``cu_seqlens`` does not fit, or the activation is unknown.
    """
    tensors = (x_BLD, weight_DK, bias_D, state_BDK, cu_seqlens)
    check("causal_conv1d", *tensors)
    _check_activation("causal_conv1d", activation)
    y, state = dispatch("causal_conv1d", x_BLD)(*tensors, activation)
    return y.to(x_BLD.dtype), state.to(x_BLD.dtype)


def centered_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Centred depthwise convolution with bias and activation; shapes as in :func:`causal_conv1d`, K odd.

    Returns:
        y ``[B, L, D]`` of x's type.

    Raises:
        ValueError: K is even, a shape or ``cu_seqlens`` does not fit, or the activation is
            unknown.
    """
    tensors = (x_BLD, weight_DK, bias_D, cu_seqlens)
    taps = check("centered_conv1d", *tensors)["K"]
    _check_activation("centered_conv1d", activation)
    if taps % 2 == 0:
        raise ValueError(f"centered_conv1d: a centred filter needs an odd number of taps, got {taps}")
    y: Tensor = dispatch("centered_conv1d", x_BLD)(*tensors, activation)
    return y.to(x_BLD.dtype)


def _check_activation(op: str, activation: str | None) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be 'silu' or None, got '{activation}'")


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return F.silu(y) if activation == "silu" else y


# --- reference: one position after the other ---


def _window_sum(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None) -> Tensor:
    """y_t = b + sum_k w_k x_{t+k} for every t whose window lies within x."""
    K = weight_DK.shape[1]
    windows = [x_BLD[:, t : t + K].transpose(1, 2) for t in range(x_BLD.shape[1] - K + 1)]  # each [B, D, K]
    y = torch.stack([(window * weight_DK).sum(-1) for window in windows], 1)
    return y if bias_D is None else y + bias_D


@implements("causal_conv1d", "reference")
def _causal_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_BDK: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor | None]:
    def one(x_BLD: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        B, L, D = x_BLD.shape
        K = weight.shape[1]
        before = x_BLD.new_zeros(B, K, D) if state is None else state.transpose(1, 2)
        seen = torch.cat([before, x_BLD], 1)  # [B, K + L, D]
        y = _window_sum(seen[:, 1:], weight, bias) if L else x_BLD
        return _activate(y, activation), seen[:, -K:].transpose(1, 2)

    return map_sequences(one, (x,), state_BDK, cu_seqlens)


@implements("centered_conv1d", "reference")
def _centered_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, activation: str | None
) -> Tensor:
    def one(x_BLD: Tensor, state: Tensor | None) -> tuple[Tensor, None]:
        half = weight.shape[1] // 2
        y = _window_sum(F.pad(x_BLD, (0, 0, half, half)), weight, bias) if x_BLD.shape[1] else x_BLD
        return _activate(y, activation), None

    return map_sequences(one, (x,), None, cu_seqlens)[0]


# --- torch: one multiply-add a tap, over blocks of positions that stay in the cache ---

BLOCK = 1 << 17  # elements of x that are worked on at once


class _WindowSum(torch.autograd.Function):
    """y_t = b + sum_k w_k x_{t+k} for every window within x ``[T, D]``, as K multiply-adds of shifted slices.

    torch.conv1d with groups=D runs one tiny convolution a channel and is several times slower
    on a CPU. The backward is written out, because autograd would keep K copies of x and write K
    gradients of its size.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        ctx.biased = bias is not None
        T, D = x_TD.shape
        K = weight.shape[1]
        y = x_TD.new_zeros(T - K + 1, D) if bias is None else bias.expand(T - K + 1, D).clone()
        for begin, end in _blocks(y):
            for k in range(K):
                y[begin:end].addcmul_(x_TD[begin + k : end + k], weight[:, k])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gy = grads[0].contiguous()
        gx, gw = torch.zeros_like(x), torch.zeros_like(weight)
        for begin, end in _blocks(gy):
            product = torch.empty_like(gy[begin:end])
            for k in range(weight.shape[1]):
                gx[begin + k : end + k].addcmul_(gy[begin:end], weight[:, k])
                gw[:, k] += torch.mul(gy[begin:end], x[begin + k : end + k], out=product).sum(0)
        return gx, gw, gy.sum(0) if ctx.biased else None


def _blocks(x_TD: Tensor) -> Iterator[tuple[int, int]]:
    """(begin, end) of each block of rows."""
    T, D = x_TD.shape
    size = max(1, BLOCK // D)
    for begin in range(0, T, size):
        yield begin, min(begin + size, T)


def _convolve(x_BLD: Tensor, weight: Tensor, bias: Tensor | None, lead: int, cu_seqlens: Tensor | None) -> Tensor:
    """Taps around each position, ``lead`` of them before it.

    All sequences are laid end to end with zeros between them, as many as a window reaches over
    a bound: one convolution of that row is right everywhere, and no position needs a mask.
    """
    B, L, D = x_BLD.shape
    if B * L == 0:
        return x_BLD
    K = weight.shape[1]
    gap = max(lead, K - 1 - lead)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(B + 1, device=x_BLD.device) * L
    sequences = torch.arange(1, len(cu_seqlens), device=x_BLD.device).repeat_interleave(cu_seqlens.diff())
    place = torch.arange(B * L, device=x_BLD.device) + gap * sequences
    row = x_BLD.new_zeros(B * L + gap * len(cu_seqlens), D).index_copy(0, place, x_BLD.reshape(B * L, D))
    y: Tensor = _WindowSum.apply(row, weight, bias)
    return y.index_select(0, place - lead).view(B, L, D)


@implements("causal_conv1d", "torch")
def torch_causal(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_BDK: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv1d` on any device and in any precision."""
    K = weight.shape[1]
    seen, bounds = x, cu_seqlens
    if state_BDK is not None:  # lay the carried inputs in front of each sequence
        before = state_BDK.transpose(1, 2)
        if cu_seqlens is None:
            seen = torch.cat([before, x], 1)
        else:
            seen = torch.cat([t for pair in zip(before, x[0].split(cu_seqlens.diff().tolist())) for t in pair])[None]
            bounds = cu_seqlens + K * torch.arange(len(cu_seqlens), device=x.device)
    y = _convolve(seen, weight, bias, K - 1, bounds)
    state = last_inputs(seen, bounds, K)
    if state_BDK is not None:
        y = y[:, K:] if bounds is None else y[:, positions_of(bounds) >= K]
    return _activate(y, activation), state


def last_inputs(seen: Tensor, bounds: Tensor | None, K: int) -> Tensor:
    """The last K inputs of each sequence ``[S, D, K]``, zeros where it is shorter."""
    if bounds is None:
        return F.pad(seen, (0, 0, max(K - seen.shape[1], 0), 0))[:, -K:].transpose(1, 2)
    if seen.shape[1] == 0:
        return seen.new_zeros(len(bounds) - 1, seen.shape[2], K)
    index = bounds[1:, None] - torch.arange(K, 0, -1, device=seen.device)  # [S, K]
    inside = index >= bounds[:-1, None]
    return seen[0, index.clamp(min=0)].masked_fill(~inside[..., None], 0).transpose(1, 2)


@implements("centered_conv1d", "torch")
def torch_centered(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, activation: str | None
) -> Tensor:
    """:func:`centered_conv1d` on any device and in any precision."""
    return _activate(_convolve(x, weight, bias, weight.shape[1] // 2, cu_seqlens), activation)
