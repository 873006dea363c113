"""Every usable backend against the float64 reference on this machine: what ``recbole-ssm doctor --numerics`` runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm import ops
from recbole_ssm.ops.backend import available_backends, switch_off, use_backend

TOLERANCE = 1e-4
"""Of the largest entry: ten times what float32 leaves at these sizes, far below what any defect does."""


class Result(NamedTuple):
    """One op on one backend, in float32."""

    op: str
    backend: str
    value_error: float
    gradient_error: float
    milliseconds: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within the tolerance; a NaN is not."""
        return self.value_error <= TOLERANCE and self.gradient_error <= TOLERANCE


def run(device: str = "cpu") -> list[Result]:
    """Compare all backends, and switch off, with a warning, each that fails.

    Args:
        device: where the tensors live.
    """
    results = []
    for name, (call, tensors) in _examples(device).items():
        with use_backend("reference"):
            expected, expected_gradients, _ = _evaluate(call, [t.double() for t in tensors])
        for backend in available_backends(name):
            if backend == "reference" or (backend == "native" and device != "cpu"):
                continue  # there the torch backend takes the place of the native one
            with use_backend(backend):
                value, gradients, seconds = _evaluate(call, tensors)
            error = max(_error(f, e) for f, e in zip(gradients, expected_gradients))
            results.append(Result(name, backend, _error(value, expected), error, seconds * 1e3))
    for backend in {result.backend for result in results if not result.passed} - {"torch"}:
        failed = ", ".join(r.op for r in results if r.backend == backend and not r.passed)
        logging.getLogger().warning(f"backend {backend} is switched off: it computes {failed} wrongly on this machine")
        switch_off(backend)
    return results


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite where a NaN is found."""
    difference = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    return float(torch.nan_to_num(difference, nan=torch.inf))


def _evaluate(call: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...], float]:
    """Value, gradients, and the shortest of three runs in seconds."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        value = call(*inputs)
        weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
        gradients = torch.autograd.grad(value, inputs, weights)
        times.append(time.perf_counter() - start)
    return value.detach(), gradients, min(times)


def _examples(device: str) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """A call and its inputs for each op: sizes of this field, and lengths that cut every kernel's chunks."""
    generator = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    B, L, D, N, H, P = 4, 150, 40, 16, 4, 10
    A_DN, A_H = -torch.arange(1.0, N + 1, device=device).repeat(D, 1), -torch.arange(1.0, H + 1, device=device)
    scan = [r(B, L, D), r(B, L, D) - 2, A_DN, r(B, L, N), r(B, L, N), r(D), r(B, L, D)]
    steps = F.softplus(r(B, L, H) - 2), F.softplus(r(B, L, H) - 2)
    maps = [r(B, L, 2, N) for _ in range(4)]

    def first(op: Callable[..., Any], **keywords: Any) -> Callable[..., Tensor]:
        return lambda *tensors: op(*tensors, **keywords)[0]

    def last(op: Callable[..., Any], *at_last: int, **keywords: Any) -> Callable[..., Tensor]:
        """The op with those of its arguments taken at the last position."""
        return lambda *t: op(*[v[:, -1] if i in at_last else v for i, v in enumerate(t)], **keywords)

    return {
        "selective_scan": (first(ops.selective_scan, dt_softplus=True), scan),
        "selective_scan_last": (last(ops.selective_scan_last, 4, 6, dt_softplus=True), scan),
        "ssd": (first(ops.ssd), [r(B, L, H, P), steps[0], A_H, *maps[:2], r(H)]),
        "ssd_last": (last(ops.ssd_last, 4), [r(B, L, H, P), steps[0], A_H, *maps[:2], r(H)]),
        "quasiseparable": (ops.quasiseparable, [r(B, L, H, P), *steps, A_H, *maps]),
        "causal_conv1d": (first(ops.causal_conv1d, activation="silu"), [r(B, L, D), r(D, 4), r(D)]),
        "centered_conv1d": (
            lambda *t: ops.centered_conv1d(*t, activation="silu"),
            [r(B, L, D), r(D, 7), r(D)],
        ),
    }
