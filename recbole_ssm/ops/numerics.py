"""What the scans share: precision, step sizes, decays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """Let a function compute in the types of its tensors; autocast would take products of them in half precision."""

    @functools.wraps(function)
    def exact(*arguments: Any, **options: Any) -> Any:
        device = next(a.device.type for a in arguments if isinstance(a, Tensor))
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*arguments, **options)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **options)

    return cast("Function", exact)


def at_least_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an implementation compute in float32, or in float64 where a tensor has it, and return y in the dtype of x.

    A state in half precision would forget, so what comes back beside y stays as wide as it was
    computed.
    """
    exact = without_autocast(function)

    @functools.wraps(function)
    def widened(x: Tensor, *arguments: Any) -> Any:
        dtype = torch.promote_types(x.dtype, torch.float32)
        for a in arguments:
            if isinstance(a, Tensor) and a.is_floating_point():
                dtype = torch.promote_types(dtype, a.dtype)
        out = exact(
            x.to(dtype), *[a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        )
        return (out[0].to(x.dtype), *out[1:]) if isinstance(out, tuple) else out.to(x.dtype)

    return widened


def step_size(op: str, dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """dt + bias, through softplus if asked, in float32 or wider.

    Args:
        op: whose argument ``dt_bias`` the bias is, for the message.
        dt: ``[..., D]`` (of SSD ``[..., H]``).
        bias: one number for each of the last dimension, or None.
        softplus: whether softplus is applied.

    Raises:
        ValueError: the shape of the bias does not fit.
    """
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if bias is not None:
        if bias.shape != dt.shape[-1:]:
            raise ValueError(f"{op}: dt_bias must have shape {list(dt.shape[-1:])}, got {list(bias.shape)}")
        dt = dt + bias
    return F.softplus(dt) if softplus else dt


def floor_of_exponent(dtype: torch.dtype) -> float:
    """The exponent below which a decay is as good as zero.

    The result of exp would underflow there, and exp takes a path ten times slower where it
    does.
    """
    return -700.0 if dtype == torch.float64 else -80.0


def decay_of(exponent: Tensor) -> Tensor:
    """exp of the exponent of a decay, held between the floor and 0."""
    return exponent.clamp(floor_of_exponent(exponent.dtype), 0.0).exp()


_MATMUL = torch.backends.cuda.matmul
# From PyTorch 2.9 on; the former name is an error where a user has set the new one.
_RENAMED = hasattr(_MATMUL, "fp32_precision")


def tf32_allowed() -> bool:
    """Whether products of float32 on a GPU may take its first ten bits, as ``allow_tf32`` of PyTorch says."""
    return bool(_MATMUL.fp32_precision == "tf32" if _RENAMED else _MATMUL.allow_tf32)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let products of float32 take all its bits within a ``with`` block."""
    name, exact = ("fp32_precision", "ieee") if _RENAMED else ("allow_tf32", False)
    before = getattr(_MATMUL, name)
    setattr(_MATMUL, name, exact)
    try:
        yield
    finally:
        setattr(_MATMUL, name, before)
