"""What the ops share: checks of shapes, precision, step sizes, decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def expect_shape(op: str, **arguments: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise a ``ValueError`` that names the first given tensor whose shape is not the expected one."""
    for name, (tensor, shape) in arguments.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def expect_groups(op: str, groups: int, heads: int) -> None:
    """Raise a ``ValueError`` unless the groups that share B and C divide the heads."""
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: the {groups} groups of B must divide the {heads} heads of x")


def step_size(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """dt + bias, through softplus if asked, in float32 or wider."""
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if bias is not None:
        dt = dt + bias
    return F.softplus(dt) if softplus else dt


def widen(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in one dtype, float32 at least: a state in half precision would forget."""
    dtype = torch.float32
    for t in tensors:
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def takes_half(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark an implementation that reads half precision as it stands in memory, and itself sees to the digits."""
    function.takes_half = True  # type: ignore[attr-defined]
    return function


def widen_for(function: Callable[..., Any], *tensors: Tensor | None) -> tuple[Any, ...]:
    """What the implementation is given: :func:`widen`, unless it :func:`takes_half`."""
    return tensors if getattr(function, "takes_half", False) else widen(*tensors)


def floor_of_exponent(dtype: torch.dtype) -> float:
    """Below this a decay is as good as zero; exp takes a path ten times slower where its result underflows."""
    return -700.0 if dtype == torch.float64 else -80.0


def decay_of(exponent: Tensor) -> Tensor:
    """exp of the exponent of a decay, held between the floor and 0."""
    return exponent.clamp(floor_of_exponent(exponent.dtype), 0.0).exp()
