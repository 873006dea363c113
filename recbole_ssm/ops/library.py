"""What the compiled backends share: operators of ``torch.library``, so that compile and export see through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


class Namespace:
    """The operators of one backend, ``torch.ops.<name>``.

    Args:
        name: of the namespace.
        devices: dispatch keys (``"CPU"``, ``"CUDA"``) that the functions serve.
    """

    def __init__(self, name: str, devices: Sequence[str]) -> None:
        self._name, self._devices = name, devices
        self._library = torch.library.Library(name, "DEF")

    def define(self, schema: str, function: Any, fake: Any) -> Any:
        """An operator; ``fake`` gives its outputs' shapes alone."""
        name = schema.partition("(")[0]
        self._library.define(schema)
        for device in self._devices:
            self._library.impl(name, function, device)
        torch.library.register_fake(f"{self._name}::{name}", fake, lib=self._library)
        return getattr(getattr(torch.ops, self._name), name).default

    def differentiate(self, operator: Any, backward_operator: Any, backward: Any, setup: Any) -> None:
        """Give an operator its gradient; a second derivative is an error (PyTorch would warn and return zeros).

        ``backward_operator`` is the operator that ``backward`` calls, None where it calls the first one again.
        """

        def refuse(ctx: Any, *gradients: Any) -> None:
            raise NotImplementedError(f"{operator} has no second derivative; use ssm_backend: reference")

        torch.library.register_autograd(operator, backward, setup_context=setup, lib=self._library)
        if backward_operator is not None:
            torch.library.register_autograd(backward_operator, refuse, lib=self._library)


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Number of sequences in ``[B, L, ...]``."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def no_tangents(*tensors: Tensor | None) -> bool:
    """Whether none carries a tangent of forward differentiation: an operator would drop it without a word."""
    return torch.compiler.is_compiling() or all(t is None or unpack_dual(t).tangent is None for t in tensors)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def like(t: Tensor | None) -> Tensor | None:
    """New contiguous memory of its shape."""
    return None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)


def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors alone: an empty one stands for None."""
    return tuple(torch.empty(0) if t is None else t for t in tensors)


def absent(gradient: Tensor, given: Tensor | None) -> Tensor | None:
    """The other way round: the gradient of what was not given is None."""
    return None if given is None else gradient


def expect_kept(op: str, kept: Tensor, *shape: int) -> None:
    """An exported program may run backward although its forward was traced without gradients."""
    if tuple(kept.shape) != shape:
        raise ValueError(f"{op}: the forward kept no states for a backward; run or export it with gradients enabled")


def expect_shape(op: str, **arguments: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise a ``ValueError`` that names the first given tensor whose shape is not the expected one."""
    for name, (tensor, shape) in arguments.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def expect_groups(op: str, groups: int, heads: int) -> None:
    """Raise a ``ValueError`` unless the groups that share B and C divide the heads."""
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: the {groups} groups of B must divide the {heads} heads of x")
