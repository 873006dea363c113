"""Milliseconds and memory of every op on every backend, forward and forward + backward, over four lengths.

Sizes are those of this field: 128 inner channels, states of 32 (selective scan) and 64 (SSD, two heads of 64). Each
length has about the same number of tokens, so ns_token shows whether time grows with the length alone.
speedup_over_native is the median of the native backend in this run over the row's own: above 1 is faster. floor_share
is the share of the machine's roof that is reached: the least time that the operations (at the rate of a large matrix
product, measured beside it; an exponential counts as 14) and the bytes that must be moved (at the rate of a copy)
allow, over the time taken. On a busy machine it can pass 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm import ops
from recbole_ssm.arguments import add_counts, sizes, some_of
from recbole_ssm.bench import Row
from recbole_ssm.bench.measure import add_device, backends_on, extra_memory, medians, roofs

# The plain loop stores every state: beyond this length it takes minutes and gigabytes.
REFERENCE_UP_TO = 200
D, N, H, P, N_SSD, K = 128, 32, 2, 64, 64, 4


class Case(NamedTuple):
    """One op at one shape, with the least that it costs: float operations and floats moved, (forward, backward)."""

    call: Callable[..., Tensor]
    tensors: list[Tensor]
    operations: tuple[float, float]
    floats: tuple[float, float]


def _scan(B: int, L: int, last: bool = False) -> Case:
    tensors = [
        torch.randn(B, L, D), torch.randn(B, L, D), -torch.arange(1.0, N + 1).repeat(D, 1), torch.randn(B, L, N),
        torch.randn(B, L, N), torch.ones(D), torch.randn(B, L, D), torch.full((D,), -3.0),
    ]  # fmt: skip

    def call(*t: Tensor) -> Tensor:
        x, dt, A, B_, C, skip, z, bias = t
        if last:
            C, z = C[:, -1], z[:, -1]
            return ops.selective_scan_last(x, dt, A, B_, C, skip, z, dt_bias=bias, dt_softplus=True)
        return ops.selective_scan(x, dt, A, B_, C, skip, z, dt_bias=bias, dt_softplus=True)[0]

    tokens, states = B * L, float(B * L * D * N)
    if last:
        return Case(call, tensors, (17 * states, 25 * states), _moved(tokens, 2 * D + N, 0))
    return Case(call, tensors, (20 * states, 34 * states), _moved(tokens, 3 * D + 2 * N, D))


def _ssd(B: int, L: int, last: bool = False) -> Case:
    maps = [torch.randn(B, L, 1, N_SSD) for _ in range(2)]
    tensors = [torch.randn(B, L, H, P), torch.randn(B, L, H) - 3, -1 - 15 * torch.rand(H), *maps, torch.ones(H)]

    def call(*t: Tensor) -> Tensor:
        x, dt, A, B_, C, skip = t
        if last:
            return ops.ssd_last(x, dt, A, B_, C[:, -1], skip, dt_softplus=True)
        return ops.ssd(x, dt, A, B_, C, skip, dt_softplus=True)[0]

    tokens, pairs, states = B * L, min(L, 64) / 2, 2.0 * N_SSD * H * P
    if last:
        work = 2.0 * tokens * (N_SSD + H * P)
        return Case(call, tensors, (work, 3 * work), _moved(tokens, H * P + H + N_SSD, 0))
    forward = 2 * pairs * (N_SSD + H * P) + states * (1 if L <= 64 else 2)
    backward = 2 * pairs * (3 * N_SSD + 2 * H * P) + (0 if L <= 64 else 4 * states)
    return Case(call, tensors, (forward * tokens, backward * tokens), _moved(tokens, H * P + H + 2 * N_SSD, H * P))


def _quasiseparable(B: int, L: int) -> Case:
    steps = [F.softplus(torch.randn(B, L, H) - 3) for _ in range(2)]
    maps = [torch.randn(B, L, 1, N_SSD) for _ in range(4)]

    tokens, pairs, states = B * L, min(L, 64) / 2, 0.0 if L <= 64 else 2.0 * N_SSD * H * P
    forward = 2 * (2 * pairs * (N_SSD + H * P) + 2 * states)
    backward = 2 * (2 * pairs * (3 * N_SSD + 2 * H * P) + 4 * states)
    tensors = [torch.randn(B, L, H, P), *steps, -1 - torch.rand(H), *maps]
    return Case(
        ops.quasiseparable,
        tensors,
        (forward * tokens, backward * tokens),
        _moved(tokens, H * P + 2 * H + 4 * N_SSD, H * P),
    )


def _conv(op: Callable[..., Any], taps: int) -> Callable[[int, int], Case]:
    def case(B: int, L: int) -> Case:
        def call(*t: Tensor) -> Tensor:
            out = op(*t, activation="silu")
            return out[0] if isinstance(out, tuple) else out

        elements = B * L * D
        work = (2.0 * taps + 20) * elements
        tensors = [torch.randn(B, L, D), torch.randn(D, taps), torch.randn(D)]
        return Case(call, tensors, (work, work + 4.0 * taps * elements), _moved(B * L, D, D))

    return case


def _moved(tokens: int, read: int, written: int) -> tuple[float, float]:
    """The floats that a forward and a backward pass must move at least: their inputs and outputs, each once."""
    return float(tokens * (read + written)), float(tokens * (2 * read + written))


CASES: dict[str, Callable[[int, int], Case]] = {
    "selective_scan": _scan,
    "selective_scan_last": partial(_scan, last=True),
    "ssd": _ssd,
    "ssd_last": partial(_ssd, last=True),
    "quasiseparable": _quasiseparable,
    "causal_conv1d": _conv(ops.causal_conv1d, K),
    "centered_conv1d": _conv(ops.centered_conv1d, 7),
}


def _plain_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same convolution as everybody writes it, with torch.conv1d."""
    K, L = weight.shape[1], x.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=K - 1, groups=x.shape[2])
    return F.silu(y[..., :L]).transpose(1, 2)


def _mambapy(*t: Tensor) -> Tensor:
    """The selective scan as mambapy computes it: its parallel scan over all states at once."""
    from mambapy.pscan import pscan

    x, dt, A, B, C, skip, z, bias = t
    dt = F.softplus(dt + bias)
    states = pscan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None])  # [B, L, D, N]
    return ((states @ C[..., None]).squeeze(-1) + skip * x) * F.silu(z)


def _mamba_ssm(*t: Tensor) -> Tensor:
    """The selective scan as mamba-ssm's own plain function computes it."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    x, dt, A, B, C, skip, z, bias = t
    x, dt, B, C, z = (v.transpose(1, 2) for v in (x, dt, B, C, z))
    y: Tensor = selective_scan_ref(x, dt, A, B, C, skip, z, bias, True).transpose(1, 2)
    return y


def _others(name: str, L: int) -> dict[str, Callable[..., Tensor]]:
    """Other packages' code for the same op, where it is installed; on short sequences only, as it keeps all states."""
    if name == "causal_conv1d":
        return {"conv1d": _plain_conv1d}
    usable = {}
    if name == "selective_scan" and L <= REFERENCE_UP_TO:
        for package, call in (("mambapy", _mambapy), ("mamba_ssm", _mamba_ssm)):
            try:
                with torch.no_grad():
                    call(*_scan(1, 2).tensors)
                usable[package] = call
            except Exception:  # it is not installed, or fails in one of many ways on a machine without a GPU
                continue
    return usable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--ops", type=some_of(CASES), default=",".join(CASES), help="separated by commas")
    parser.add_argument("--lengths", type=sizes, default="50,200,2000,16000", help="separated by commas")
    add_counts(
        parser,
        tokens=(12_800, "of a batch; one sequence may have more"),
        rounds=(5, "measurements, of which the median counts"),
    )
    add_device(parser)


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Measure; one row an op, length, direction and backend."""
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads; native kernels: {ops.native.unusable or ops.native.instruction_set}")
    for name in options.ops:
        for L in options.lengths:
            B = max(1, options.tokens // L)
            yield from _rows(name, B, L, CASES[name](B, L), options.rounds, options.device)


def _rows(name: str, B: int, L: int, case: Case, rounds: int, device: torch.device) -> list[Row]:
    inputs = [t.to(device).requires_grad_() for t in case.tensors]
    backends = backends_on(device)
    calls = {b: case.call for b in backends if b != "reference" or L <= REFERENCE_UP_TO}
    calls |= _others(name, L)
    with torch.no_grad():
        gradient = torch.randn_like(case.call(*inputs))

    def forward(backend: str) -> None:
        with torch.no_grad(), ops.use_backend(backend if backend in backends else "auto"):
            calls[backend](*inputs)

    def both(backend: str) -> None:
        with ops.use_backend(backend if backend in backends else "auto"):
            torch.autograd.grad(calls[backend](*inputs), inputs, gradient)

    found: list[Row] = []
    rate, bandwidth = roofs(rounds, device)
    least = [max(o / rate, 4 * f / bandwidth) for o, f in zip(case.operations, case.floats)]
    for direction, function, floor in (("forward", forward, least[0]), ("forward+backward", both, sum(least))):
        seconds = medians({backend: partial(function, backend) for backend in calls}, rounds, device)
        for backend, value in seconds.items():
            memory = extra_memory(partial(function, backend), device)
            found.append(
                {
                    "op": name,
                    "B": B,
                    "L": L,
                    "direction": direction,
                    "backend": backend,
                    "ms": value * 1e3,
                    "speedup_over_native": seconds["native"] / value if "native" in seconds else "",
                    "ns_token": value / (B * L) * 1e9,
                    "MiB": "" if memory is None else memory / 2**20,
                    "floor_share": floor / value,
                    "GFLOP_s_roof": rate / 1e9,
                    "GB_s_roof": bandwidth / 1e9,
                }
            )
    return found
