"""What the benchmarks measure with: times of several functions in turn, memory, and what the machine can do at best."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recbole_ssm import clock
from recbole_ssm.errors import UserError, first_line
from recbole_ssm.memory import return_free_memory
from recbole_ssm.ops.backend import available_backends

Function = Callable[[], object]


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--device``, which becomes a ``torch.device``."""
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, or cuda for the GPU")


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' cannot be used ({first_line(error)})") from error


def backends_on(device: torch.device) -> list[str]:
    """The backends that have code of their own for a device: ``native`` is for the CPU, ``cuda`` for the GPU."""
    other = "native" if device.type == "cuda" else "cuda"
    return [backend for backend in available_backends() if backend != other]


def medians(functions: dict[str, Function], rounds: int, device: torch.device | str = "cpu") -> dict[str, float]:
    """Median seconds of each function: of processor time on one thread of a CPU, else of wall time.

    The functions take turns, so that a slow minute of the machine meets all of them. Each runs once untimed before it
    is timed, because the one before it has filled the caches with its own data.
    """
    one_thread = torch.get_num_threads() == 1 and torch.device(device).type == "cpu"
    now = partial(clock.now, device, time.process_time if one_thread else time.perf_counter)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            start = now()
            function()
            times[name].append(now() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def extra_memory(function: Function, device: torch.device) -> int | None:
    """Bytes by which one call lifts the memory in use, of the process or of PyTorch on a GPU.

    None where the system does not tell: on a CPU, only Linux does.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    # What the allocator holds in reserve would hide what a call takes.
    return_free_memory()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        # From here on the kernel notes a new peak.
        reset.write_text("5")
        before = _bytes_in(status, "VmRSS")
    except (OSError, ValueError):
        function()
        return None
    function()
    return _bytes_in(status, "VmHWM") - before


def _bytes_in(status: Path, key: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"{key} is not in {status}")


def roofs(rounds: int, device: torch.device) -> tuple[float, float]:
    """Float operations a second of a large float32 matrix product, and bytes a second (read and written) of a copy."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    source = torch.randn(1 << 24, device=device)
    target = torch.empty_like(source)
    found = medians({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds, device)
    return 2 * size**3 / found["product"], 2 * source.nbytes / found["copy"]


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_a_process(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """The result of a call in a new process, so that its memory, settings and environment are its own.

    Raises:
        UserError: the process was ended from outside, as a system does when memory runs out.
    """
    with _environment(environment or {}), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            what = " ".join(str(a) for a in arguments if isinstance(a, str))
            raise UserError(f"bench: the process that measured {what} was killed; perhaps memory ran out") from error
