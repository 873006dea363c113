"""The ``cuda`` backend: float32, bfloat16 and float16 on an NVIDIA GPU, with states and sums in float32.

Of each op the first that passes its self-test there: mamba-ssm's or causal-conv1d's kernels where they are installed
(:mod:`recbole_ssm.ops.cuda.upstream`), then ours in Triton (:mod:`recbole_ssm.ops.cuda.operators`), then PyTorch's
operations, which also take what no kernel does. Triton comes with PyTorch's wheels for CUDA and is imported when the
first kernel runs, not before.

With ``TRITON_INTERPRET=1`` in the environment Triton runs the kernels on the CPU, slowly: so they are tested anywhere.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.ops.arguments import takes_half, widen
from recbole_ssm.ops.backend import HALF, implements, requires
from recbole_ssm.ops.causal_conv1d import torch_causal, torch_centered
from recbole_ssm.ops.cuda import operators
from recbole_ssm.ops.operators import no_tangents
from recbole_ssm.ops.quasiseparable import torch_quasiseparable
from recbole_ssm.ops.selective_scan import torch_scan, torch_scan_last
from recbole_ssm.ops.ssd import torch_ssd, torch_ssd_last

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unusable() -> str:
    """Why there is no cuda backend on this machine; "" where there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or more"
    return ""


def _fit(*tensors: Tensor | None) -> bool:
    """Whether the kernels take them: all on the GPU, none in float64, none with a tangent."""
    given = [t for t in tensors if t is not None]
    fits = all((t.is_cuda or INTERPRETED) and t.dtype in (torch.float32, *HALF) for t in given)
    return fits and no_tangents(*given)


@implements("selective_scan", "cuda", "triton")
def _selective_scan(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *tensors, _, state, _ = rest
    if A.shape[1] > operators.MOST_STATE or not _fit(x, dt, A, *tensors, state):
        return torch_scan(x, dt, A, *rest)
    return operators.selective_scan(x, dt, A, *rest)


@implements("selective_scan_last", "cuda", "triton")
def _selective_scan_last(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> Tensor:
    if A.shape[1] > operators.MOST_STATE or not _fit(x, dt, A, *rest[:-2]):
        return torch_scan_last(x, dt, A, *rest)
    return operators.selective_scan_last(x, dt, A, *rest)


def _too_large(x: Tensor, B: Tensor) -> bool:
    return x.shape[3] * B.shape[3] > operators.MOST_CELLS


@implements("ssd", "cuda", "triton")
@takes_half
def _ssd(
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
    if _too_large(x, B) or not _fit(x, dt, A, B, C, D, state):
        x, dt, A, B, C, D, state = widen(x, dt, A, B, C, D, state)
        return torch_ssd(x, dt, A, B, C, D, state, cu_seqlens, return_state)
    return operators.ssd(x, dt, A, B, C, D, state, cu_seqlens, return_state)


@implements("ssd_last", "cuda", "triton")
@takes_half
def _ssd_last(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cu_seqlens: Any) -> Tensor:
    if _too_large(x, B) or not _fit(x, dt, A, B, C, D):
        return torch_ssd_last(*widen(x, dt, A, B, C, D), cu_seqlens)
    return operators.ssd_last(x, dt, A, B, C, D, cu_seqlens)


@implements("quasiseparable", "cuda", "triton")
@takes_half
def _quasiseparable(x: Tensor, *given: Any) -> Tensor:
    *tensors, cu_seqlens = given
    if _too_large(x, tensors[3]) or not _fit(x, *tensors):
        return torch_quasiseparable(*widen(x, *tensors), cu_seqlens)
    return operators.quasiseparable(x, *given)


@implements("causal_conv1d", "cuda", "triton")
def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, state_BDK: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    kernel = operators.causal_conv1d
    if weight.shape[1] > operators.MOST_TAPS or not _fit(x, weight, bias, state_BDK):
        kernel = torch_causal
    return kernel(x, weight, bias, state_BDK=state_BDK, **options)


@implements("centered_conv1d", "cuda", "triton")
def _centered_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    kernel = operators.centered_conv1d
    if weight.shape[1] > operators.MOST_TAPS or not _fit(x, weight, bias):
        kernel = torch_centered
    return kernel(x, weight, bias, **options)


requires("cuda", unusable)
