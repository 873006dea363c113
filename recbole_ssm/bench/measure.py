"""What the benchmarks measure with: times of several functions in turn, memory, and what the machine can do at best."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.memory import return_free_memory
from recbole_ssm.ops.backend import available_backends

Function = Callable[[], object]


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option ``--device``."""
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the GPU (default: cpu)")


def device_of(options: argparse.Namespace) -> str:
    """What ``--device`` says.

    Raises:
        UserError: it names no device, or one that is not there.
    """
    device: str = chosen("--device", options.device, ("cpu", "cuda"))[0]
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no GPU that PyTorch can use; leave it out to measure the CPU")
    return device


def backends_on(device: str) -> list[str]:
    """The backends that compute on a device by themselves: native none but the CPU's, cuda none but the GPU's."""
    other = "native" if device == "cuda" else "cuda"
    return [backend for backend in available_backends() if backend != other]


def medians(functions: dict[str, Function], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each function: of processor time where PyTorch has one thread, else on the wall.

    They take turns, so that a slow minute of the machine meets all of them; each runs once unmeasured before it is
    measured, since the one before it has filled the caches with its own data. A GPU is waited for before and after.
    """
    clock = time.process_time if torch.get_num_threads() == 1 and device == "cpu" else time.perf_counter
    wait: Function = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            wait()
            start = clock()
            function()
            wait()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(function: Function, device: str = "cpu") -> float | None:
    """MiB by which one call lifts the memory of the process, on a GPU what PyTorch holds there; None where the system
    does not tell.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - start) / 2**20
    return_free_memory()  # what the allocator holds in reserve would hide what a call takes
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the peak starts anew from here
        before = _kibibytes(status, "VmRSS")
        function()
        return (_kibibytes(status, "VmHWM") - before) / 1024
    except (OSError, ValueError):
        return None


def chosen(option: str, text: str, known: Collection[str]) -> list[str]:
    """The names of an option, separated by commas.

    Raises:
        UserError: one of them is not known, or stands twice.
    """
    names = text.split(",")
    if len(set(names)) < len(names):
        raise UserError(f"{option}: a name stands twice in {text}")
    for name in names:
        if name not in known:
            raise UserError(f"{option}: '{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}")
    return names


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of an option, separated by commas, each once.

    Raises:
        UserError: one of them is no whole number.
    """
    try:
        return list(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        raise UserError(f"{option}: must be whole numbers with commas, got {text}") from None


def _kibibytes(status: Path, key: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ValueError(f"{key} is not in {status}")


def roofs(rounds: int = 5, device: str = "cpu") -> tuple[float, float]:
    """Float operations a second of a large float32 matrix product, and bytes a second (read and written) of a copy."""
    size = 1024 if device == "cpu" else 8192
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    source = torch.randn(1 << 24, device=device)
    target = torch.empty_like(source)
    found = medians({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds, device)
    return 2 * size**3 / found["product"], 2 * source.nbytes / found["copy"]
