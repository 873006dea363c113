"""Every usable backend against the float64 reference on this machine.

:func:`why_wrong` is the quick test of one implementation before its first use; :func:`run` is
what ``recbole-ssm doctor --numerics`` shows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.attention import packed_attention
from recbole_ssm.ops.backend import INTERPRETED, available_backends, dispatch, force, implementations, switch_off
from recbole_ssm.ops.dropout import dropout
from recbole_ssm.ops.linear_cross_entropy import linear_cross_entropy
from recbole_ssm.ops.numerics import without_tf32
from recbole_ssm.ops.rank_targets import rank_targets
from recbole_ssm.ops.table import OPS

TOLERANCE = 1e-4
"""Of the largest entry: ten times the rounding errors of float32 at these sizes, and far below any defect."""
LONG = ("selective_scan", "selective_scan_last", "ssd", "quasiseparable")
"""Ops whose kernels for GPUs cut a long sequence into pieces, and so are tried on one too."""
LENGTH = 520
"""Of that sequence."""


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


class Example(NamedTuple):
    """A call of an op, and its tensors, which all take a gradient."""

    call: Callable[..., Tensor]
    tensors: list[Tensor]


more_examples: dict[str, Callable[[torch.device, int], Example]] = {}
"""Examples by name of what is not in the table of ops but has backends as an op has, such as the step of a layer.

Each is called with a device and a number of sequences.
"""


def why_wrong(op: str, function: Callable[..., Any], device: torch.device) -> str:
    """Compare values and gradients of an implementation with the reference on a small example.

    It runs in a thread of its own, because what the caller may have switched on (inference
    mode, autocast, a transform of ``torch.func``, a default device) holds in the caller's
    thread only. torch's generator is left as it was.

    Returns:
        "" if it is right, else what is wrong.
    """
    found: list[str] = []

    def compare() -> None:
        try:
            with torch.random.fork_rng(devices=[]):
                results = [_compare(op, "", function, _example(op, device, B=2, L=70), rounds=1)]
                if op in LONG and device.type == "cuda":
                    # The vectorised form in float64 is as exact as the reference, and sooner there.
                    long = _example(op, device, B=1, L=LENGTH)
                    results.append(_compare(op, "", function, long, rounds=1, exact="torch"))
            if not all(result.passed for result in results):
                error = max(max(result.value_error, result.gradient_error) for result in results)
                found.append(f"on this machine its result is wrong by {error:.1e} of the largest entry")
        except Exception as error:  # whatever a compiler or a driver raises
            line = (str(error).splitlines() or [""])[0]
            found.append(f"it does not run on this machine ({type(error).__name__}: {line})")

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    return found[0] if found else ""


def run(device: str = "cpu") -> list[Result]:
    """Compare all backends, and switch off, with a warning, each that fails.

    Args:
        device: where the tensors live.
    """
    results = []
    where = torch.device(device)
    examples, small = _examples(where, B=4, L=150), _examples(where, B=1, L=40)
    if device != "cpu":
        examples |= {op: _example(op, where, B=1, L=LENGTH) for op in LONG}
    for op in examples:
        for backend in available_backends(op):
            interpreted = backend == "cuda" and device == "cpu"
            # The native backend is for the CPU: elsewhere its op would run torch's code and be tested twice.
            if backend == "reference" or (backend == "native" and device != "cpu"):
                continue
            if interpreted and not INTERPRETED:
                continue
            example, rounds = (small[op], 1) if interpreted else (examples[op], 3)
            for found in implementations(op, backend):
                try:
                    result = _compare(op, found.name, found.function, example, rounds)
                except Exception as error:
                    logging.getLogger().warning(f"op {op}: backend {found.name}: {error}")
                    result = Result(op, found.name, torch.inf, torch.inf, torch.nan)
                results.append(result)
                if not result.passed and backend != "torch":
                    switch_off(op, backend, found.name, "doctor finds it wrong on this machine")
    return results


def _compare(
    op: str, name: str, function: Callable[..., Any], example: Example, rounds: int, exact: str = "reference"
) -> Result:
    with force(op, implementations(op, exact)[0].function):
        expected, expected_gradients, _ = _evaluate(example.call, [t.double().cpu() for t in example.tensors], 1)
    with force(op, function), without_tf32():
        value, gradients, seconds = _evaluate(example.call, example.tensors, rounds)
    error = max(_error(f, e) for f, e in zip(gradients, expected_gradients))
    return Result(op, name, _error(value, expected), error, seconds * 1e3)


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite where a NaN is found."""
    difference = (found.double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    return float(torch.nan_to_num(difference, nan=torch.inf))


def _evaluate(
    call: Callable[..., Tensor], tensors: list[Tensor], rounds: int
) -> tuple[Tensor, tuple[Tensor, ...], float]:
    """Value, gradients, and the shortest run in seconds."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        value = call(*inputs)
        weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
        gradients = torch.autograd.grad(value, inputs, weights)
        if value.is_cuda:
            torch.cuda.synchronize(value.device)
        times.append(time.perf_counter() - start)
    return value.detach(), gradients, min(times)


# --- the examples, in sizes of this field's models and lengths that end within a kernel's chunk ---


def _example(op: str, device: torch.device, B: int, L: int) -> Example:
    return more_examples[op](device, B) if op in more_examples else _EXAMPLES[op](device, B, L)


def _examples(device: torch.device, B: int, L: int) -> dict[str, Example]:
    """An example of each op."""
    return {op: _example(op, device, B, L) for op in [*_EXAMPLES, *more_examples]}


class _Numbers:
    """Numbers between -2 and 2 without a period, different ones at each call."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._phase = device, 0.0

    def __call__(self, *shape: int) -> Tensor:
        self._phase += 0.7
        count = torch.Size(shape).numel()
        return (2 * torch.sin(1e4 * torch.sin(torch.arange(count) + self._phase))).view(shape).to(self._device)


BOUNDS = (0, 1, 1, 3)
"""Where the packed sequences of an example begin: one of one event, an empty one, one of two, and the rest."""
_OPTIONS = {"dt_softplus": True, "activation": "silu", "return_state": True}


def _along_sequences(op: str, device: torch.device, B: int, L: int) -> Example:
    """A padded batch that begins with nothing, and its first row as a packed one that goes on from states, where the
    op has any. All that the op returns is joined in one row.
    """
    row, numbers = OPS[op], _Numbers(device)
    arguments = [t for t in row.tensors if t.name != "cu_seqlens"]
    sizes = {"B": B, "L": L, "S": max(B, len(BOUNDS)), "D": 48, "N": 32, "H": 4, "G": 2, "P": 16}
    sizes["K"] = 7 if op == "centered_conv1d" else 4
    options = [_OPTIONS[name] for name, _ in row.options]

    def given(name: str, letters: str) -> Tensor:
        shape = [sizes[letter] for letter in letters]
        if name == "A":
            return -torch.arange(1.0, shape[-1] + 1, device=device).repeat(*shape[:-1], 1).view(shape)
        if name in ("dt", "dt_fwd", "dt_bwd"):
            raw = numbers(*shape) - 2
            return raw if ("dt_softplus", "bool") in row.options else F.softplus(raw)
        return numbers(*shape)

    def call(*tensors: Tensor) -> Tensor:
        found: list[Tensor] = []
        for count, bounds in (({"B": B, "S": B}, None), ({"B": 1, "S": len(BOUNDS)}, [*BOUNDS, L])):
            cu_seqlens = None if bounds is None else torch.tensor(bounds, device=tensors[0].device)
            taken = [
                None if t.name == "state" and bounds is None else tensor[: count.get(t.letters[0])]
                for t, tensor in zip(arguments, tensors)
            ]
            outputs = dispatch(op, tensors[0])(*taken, cu_seqlens, *options)
            found += outputs if isinstance(outputs, tuple) else [outputs]
        return torch.cat([t.flatten() for t in found])

    return Example(call, [given(t.name, t.letters) for t in arguments])


def _attention(device: torch.device, B: int, L: int) -> Example:
    """Causal and at the last positions, of packed sequences of which one is empty."""

    def call(*tensors: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in tensors)
        bounds = torch.tensor([0, 1, 1, L // 2, B * L], device=q.device)
        y = packed_attention(q, k, v, bounds, B * L)
        ends = packed_attention(q[:4], k, v, bounds, B * L, last_only=True)
        return torch.cat([y, ends])

    numbers = _Numbers(device)
    return Example(call, [numbers(B, L, 4, 16) for _ in range(3)])


def _dropout(device: torch.device, B: int, L: int) -> Example:
    """2 x, whichever elements are dropped: the op doubles those that stay, and this the others."""

    def call(x: Tensor) -> Tensor:
        y = dropout(x, 0.5)
        return torch.where(y == 0, 2 * x, y)

    return Example(call, [_Numbers(device)(B, L, 48)])


def _rows_and_items(device: torch.device, B: int, L: int) -> list[Tensor]:
    numbers = _Numbers(device)
    return [numbers(B * L, 48), numbers(300, 48)]


def _target(rows: Tensor) -> Tensor:
    """On the device of the rows, because the reference runs on the CPU."""
    return torch.arange(len(rows), device=rows.device) % 300


def _loss(device: torch.device, B: int, L: int) -> Example:
    def call(rows: Tensor, items: Tensor) -> Tensor:
        return linear_cross_entropy(rows, items, _target(rows), temperature=7.0, label_smoothing=0.1)

    return Example(call, _rows_and_items(device, B, L))


def _ranks(device: torch.device, B: int, L: int) -> Example:
    """Scores of whole numbers are ties, or are not, whatever the order of their sums."""

    def call(rows: Tensor, items: Tensor) -> Tensor:
        found = rank_targets(rows.detach().round(), items.detach().round(), _target(rows)).ranks
        return found.to(rows.dtype) + 0 * (rows.sum() + items.sum())

    return Example(call, _rows_and_items(device, B, L))


_EXAMPLES: dict[str, Callable[[torch.device, int, int], Example]] = {
    "attention": _attention,
    **{name: partial(_along_sequences, name) for name, op in OPS.items() if op.tensors[0].letters.startswith("BL")},
    "dropout": _dropout,
    "linear_cross_entropy": _loss,
    "rank_targets": _ranks,
}
