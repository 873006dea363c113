"""The ``cuda`` backend: float32, bfloat16 and float16 on an NVIDIA GPU, with states and sums in float32.

Of each op the first that passes its self-test there: mamba-ssm's or causal-conv1d's kernels where they are installed
(:mod:`recbole_ssm.ops.triton.upstream`), then ours in Triton (:mod:`recbole_ssm.ops.triton.operators`), then PyTorch's
operations, which also take what no kernel does. Triton comes with PyTorch's wheels for CUDA and is imported when the
first kernel runs, not before.

With ``TRITON_INTERPRET=1`` in the environment Triton runs the kernels on the CPU, slowly: so they are tested anywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.ops.backend import HALF, INTERPRETED, implements, requires
from recbole_ssm.ops.causal_conv1d import torch_causal, torch_centered
from recbole_ssm.ops.library import no_tangents
from recbole_ssm.ops.quasiseparable import torch_quasiseparable
from recbole_ssm.ops.selective_scan import torch_scan, torch_scan_last
from recbole_ssm.ops.ssd import torch_ssd, torch_ssd_last
from recbole_ssm.ops.triton import operators, upstream

Kernel = Callable[..., Any]


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


def _too_large(x: Tensor, B: Tensor) -> bool:
    return operators.cells(x, B) > operators.MOST_CELLS


# --- each op by a kernel, and by PyTorch where that does not take what is given -----------------------------------


def _selective_scan(kernel: Kernel, x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    fits = A.shape[1] <= operators.MOST_STATE and _fit(x, dt, A, *rest[:-2])
    return (kernel if fits else torch_scan)(x, dt, A, *rest)


def _selective_scan_last(kernel: Kernel, x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> Tensor:
    fits = A.shape[1] <= operators.MOST_STATE and _fit(x, dt, A, *rest[:-2])
    return (kernel if fits else torch_scan_last)(x, dt, A, *rest)


def _ssd(kernel: Kernel, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    tensors = rest[:-2]  # C, D, state
    if _fit(x, dt, A, B, *tensors) and not _too_large(x, B):
        return kernel(x, dt, A, B, *rest)
    return torch_ssd(x, dt, A, B, *rest)


def _ssd_last(kernel: Kernel, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
    tensors = rest[:-1]  # C, D
    if _fit(x, dt, A, B, *tensors) and not _too_large(x, B):
        return kernel(x, dt, A, B, *rest)
    return torch_ssd_last(x, dt, A, B, *rest)


def _quasiseparable(kernel: Kernel, x: Tensor, *given: Any) -> Tensor:
    tensors = given[:-1]
    if _fit(x, *tensors) and not _too_large(x, tensors[3]):
        return kernel(x, *given)
    return torch_quasiseparable(x, *given)


def _causal_conv1d(
    kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, state_BDK: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    fits = weight.shape[1] <= operators.MOST_TAPS and _fit(x, weight, bias, state_BDK)
    return (kernel if fits else torch_causal)(x, weight, bias, state_BDK, *options)


def _centered_conv1d(kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    fits = weight.shape[1] <= operators.MOST_TAPS and _fit(x, weight, bias)
    return (kernel if fits else torch_centered)(x, weight, bias, *options)


def _by(around: Kernel, kernel: Kernel) -> Kernel:
    def implementation(*arguments: Any) -> Any:
        return around(kernel, *arguments)

    return implementation


for _around in (
    _selective_scan, _selective_scan_last, _ssd, _ssd_last, _quasiseparable, _causal_conv1d, _centered_conv1d
):  # fmt: skip
    _op = _around.__name__[1:]
    for _name, _kernel in (*([] if INTERPRETED else upstream.installed(_op)), ("triton", getattr(operators, _op))):
        implements(_op, "cuda", _name)(_by(_around, _kernel))
requires("cuda", unusable)
