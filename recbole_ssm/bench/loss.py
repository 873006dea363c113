"""Milliseconds and memory of the loss over all items and of the target's rank, beside PyTorch's with the whole matrix.

A shape is rows x numbers x items. ``pytorch`` is ``cross_entropy(output @ items.T, target)`` and, for ranks, comparing
all scores with the target's; ``auto`` is what a model gets. speedup_over_pytorch is PyTorch's median in this run over
the row's own: above 1 is faster. Processor time counts on one thread, wall time on several, where the ratios of a busy
machine mean little. GFLOP_s counts the products alone: one forward, three with the gradients.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm import ops
from recbole_ssm.arguments import at_least
from recbole_ssm.bench import Row
from recbole_ssm.bench.measure import add_device, backends_on, extra_memory, medians, roofs

Ways = dict[str, Callable[..., Tensor]]
SHAPES = (
    "2048x64x12101,2048x64x3417,16x64x100,256x64x1000,512x64x1000,1024x128x1000,1024x512x1000,2048x128x500,"
    "16x512x100000,256x16x1000000,65536x16x100,65536x64x1000"
)


def shapes(text: str) -> list[tuple[int, int, int]]:
    """``"2048x64x3417,3x2x7"`` as numbers: rows, numbers and items of each shape."""
    try:
        found = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")]
    except ValueError:
        found = [()]
    if any(len(shape) != 3 or min(shape) < 1 for shape in found):
        raise argparse.ArgumentTypeError(f"must be rows x numbers x items, as 2048x64x3417, with commas; got {text}")
    return [(n, d, V) for n, d, V in found]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shapes", type=shapes, default=SHAPES, help="rows x numbers x items, separated by commas")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="measurements, of which the median counts")
    add_device(parser)


def pytorch_loss(output: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """The mean cross-entropy from all logits."""
    return F.cross_entropy(output @ items.T, target)


def pytorch_ranks(output: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """How many items score higher, from all scores."""
    scores = output @ items.T
    return (scores > scores.gather(1, target[:, None])).sum(1)


def op_loss(backend: str, output: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """The mean cross-entropy on a backend."""
    if backend == "auto":  # as a model calls it
        return ops.linear_cross_entropy(output, items, target)
    with ops.use_backend(backend):
        return ops.linear_cross_entropy(output, items, target)


def op_ranks(backend: str, output: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """How many items score higher, on a backend."""
    with ops.use_backend(backend):
        return ops.rank_targets(output, items, target).higher


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Measure; one row a shape, task and way to do it."""
    torch.manual_seed(0)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    kernels = ops.native.unusable or ops.native.instruction_set
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load {load:.1f}; native kernels: {kernels}")
    backends = [b for b in backends_on(options.device) if b != "reference"]
    backends = [b for b in backends if b in ops.available_backends("linear_cross_entropy")]
    for shape in options.shapes:
        yield from _rows(shape, backends, options.rounds, options.device, load)


def _rows(
    shape: tuple[int, int, int], backends: list[str], rounds: int, device: torch.device, load: float
) -> list[Row]:
    n, d, V = shape
    output, items = torch.randn(n, d, device=device), 0.1 * torch.randn(V, d, device=device)
    target = torch.randint(0, V, (n,), device=device)
    losses: Ways = {"pytorch": pytorch_loss, **{b: partial(op_loss, b) for b in ["auto", *backends]}}
    ranks: Ways = {"pytorch": pytorch_ranks, **{b: partial(op_ranks, b) for b in ["auto", *backends]}}

    def forward(call: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            call(output, items, target)

    def both(call: Callable[..., Tensor]) -> None:
        wanted = [output.detach().requires_grad_(), items.detach().requires_grad_()]
        call(*wanted, target).backward()

    found: list[Row] = []
    rate = roofs(rounds, device)[0]
    for task, calls, run_it, products in (
        ("loss", losses, forward, 1), ("loss and gradients", losses, both, 3), ("ranks", ranks, forward, 1)
    ):  # fmt: skip
        seconds = medians({way: partial(run_it, call) for way, call in calls.items()}, rounds, device)
        for way, value in seconds.items():
            memory = extra_memory(partial(run_it, calls[way]), device)
            found.append(
                {
                    "rows": n,
                    "numbers": d,
                    "items": V,
                    "task": task,
                    "way": way,
                    "threads": torch.get_num_threads(),
                    "ms": value * 1e3,
                    "speedup_over_pytorch": seconds["pytorch"] / value,
                    "MiB": "" if memory is None else memory / 2**20,
                    "GFLOP_s": 2 * products * n * d * V / value / 1e9,
                    "GFLOP_s_roof": rate / 1e9,
                    "instruction_set": ops.native.instruction_set,
                    "cores": os.cpu_count(),
                    "load": load,
                }
            )
    return found
