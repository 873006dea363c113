"""What the benchmarks measure with: times of several functions in turn, memory, and what the machine can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.memory import return_free_memory

Function = Callable[[], object]


def medians(functions: dict[str, Function], rounds: int) -> dict[str, float]:
    """Median seconds of each function: of processor time where PyTorch has one thread, else on the wall.

    They take turns, so that a slow minute of the machine meets all of them; each runs once unmeasured before it is
    measured, since the one before it has filled the caches with its own data.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            start = clock()
            function()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(function: Function) -> float | None:
    """MiB by which one call lifts the resident memory of the process; None where the system does not tell."""
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
        UserError: one of them is not known.
    """
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"{option}: '{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}")
    return names


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of an option, separated by commas.

    Raises:
        UserError: one of them is no whole number.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: must be whole numbers with commas, got {text}") from None


def _kibibytes(status: Path, key: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ValueError(f"{key} is not in {status}")


def roofs(rounds: int = 5) -> tuple[float, float]:
    """Float operations a second of a large float32 matrix product, and bytes a second (read and written) of a copy."""
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    found = medians({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds)
    return 2 * size**3 / found["product"], 2 * source.nbytes / found["copy"]
