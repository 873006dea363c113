"""The kernels of mamba-ssm and causal-conv1d behind our ops, for the calls that they know.

Theirs come first where they are installed and pass the self-test. What they do not know goes to
ours in Triton: a packed or a continued selective scan, a convolution of one or more than four
taps, of other than 8 n channels, or with a state. Their SSD is not used: it multiplies float32
in TF32, whose ten bits do not pass the self-test, and before its first answer it compiles over
a hundred variants of itself, which takes minutes.

They are imported when an op is first tested, not before: that alone takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.ops.causal_conv1d import last_inputs
from recbole_ssm.ops.triton import operators


def _theirs(module: str, function: str) -> Any:
    return getattr(importlib.import_module(module), function)


def _of_rows(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """Number of the sequence of each packed row ``[1, total]``."""
    if cu_seqlens is None:
        return None
    rows = torch.arange(x.shape[1], device=x.device)
    return torch.bucketize(rows, cu_seqlens[1:-1], right=True, out_int32=True)[None]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`recbole_ssm.ops.selective_scan` by ``mamba_ssm.selective_scan_fn``, which wants ``[B, D, L]``."""
    if state is not None or cu_seqlens is not None or not x.shape[1]:
        return operators.OPERATORS["selective_scan"](x, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, softplus)
    scan = _theirs("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    u, delta, B, C = (t.to(x.dtype).transpose(1, 2).contiguous() for t in (x, dt, B, C))  # they take one dtype
    z = None if z is None else z.to(x.dtype).transpose(1, 2).contiguous()
    D, dt_bias = (None if t is None else t.float() for t in (D, dt_bias))
    y, final = scan(u, delta, A.float(), B, C, D, z, dt_bias, softplus, return_last_state=True)
    return y.transpose(1, 2), final.float()


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_BDK: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """:func:`recbole_ssm.ops.causal_conv1d` by ``causal_conv1d.causal_conv1d_fn``, which wants ``[B, D, L]``."""
    (_, L, D), K = x.shape, weight.shape[1]
    if state_BDK is not None or not 2 <= K <= 4 or D % 8 or not L:
        return operators.OPERATORS["causal_conv1d"](x, weight, bias, state_BDK, cu_seqlens, activation)
    convolve = _theirs("causal_conv1d", "causal_conv1d_fn")
    seq_idx = _of_rows(x, cu_seqlens)
    y = convolve(x.contiguous().transpose(1, 2), weight, bias, seq_idx=seq_idx, activation=activation)
    return y.transpose(1, 2), last_inputs(x, cu_seqlens, K)


def installed(op: str) -> list[tuple[str, Callable[..., Any]]]:
    """Name of the library and function, where a library that has the op is installed."""
    known: dict[str, Callable[..., Any]] = {
        "selective_scan": selective_scan,
        "causal_conv1d": causal_conv1d,
    }
    module = "causal_conv1d" if op == "causal_conv1d" else "mamba_ssm"
    if op not in known or importlib.util.find_spec(module) is None:
        return []
    return [(module.replace("_", "-"), known[op])]
