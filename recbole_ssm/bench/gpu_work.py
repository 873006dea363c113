"""What ``bench gpu`` measures with: the work of one call on a GPU, a row of its table, and models that take steps."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recbole_ssm.bench import Row
from recbole_ssm.bench.untrained import model_of_a_step, random_histories

DEVICE = "cuda"
COLUMNS = ("case", "what", "dtype", "wall_ms", "gpu_ms", "launches", "waits", "idle", "MiB", "rival", "speedup", "note")
ITEMS = 12_101
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemsetAsync", "cudaMemcpyAsync")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


def row(case: str, what: str, **values: Any) -> Row:
    """A row has all columns; what it does not measure stays empty."""
    return {**dict.fromkeys(COLUMNS, ""), "case": case, "what": what, **values}


class Work(NamedTuple):
    """What one call of a function takes."""

    wall_ms: float
    gpu_ms: float
    launches: int
    waits: int
    MiB: float

    def columns(self) -> Row:
        """As columns of a row."""
        idle = max(0.0, 1 - self.gpu_ms / self.wall_ms)
        return {**self._asdict(), "idle": idle}


def measure(function: Callable[[], object], rounds: int) -> Work:
    """Time a function that launches work on the GPU; three calls of it come first and do not count."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
    busy = launches = waits = 0.0
    for event in profile.events():
        if event.device_type.name == "CUDA":
            busy += event.time_range.elapsed_us() / 1e3
        launches += event.name.startswith(LAUNCHES)
        waits += event.name in WAITS
    # The profiler itself waits once at its end.
    return Work(statistics.median(times) * 1e3, busy, int(launches), max(0, int(waits) - 1), memory)


def error_of(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry; infinite where a NaN was found."""
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    return float(torch.nan_to_num(difference, nan=torch.inf))


def compared(case: str, works: dict[str, Work], rival: str, dtype: str = "") -> list[Row]:
    """A row for each function of a case; ours are compared with the rival, where that was measured."""
    rows = []
    for name, work in works.items():
        one = row(case, name, dtype=dtype, **work.columns())
        if rival in works and name != rival:
            one |= {"rival": rival, "speedup": works[rival].wall_ms / work.wall_ms}
        rows.append(one)
    return rows


def model_and_batch(name: str, batch: int, layers: int = 1) -> tuple[Any, Any]:
    """A model on the GPU with full histories of 50 items for it; SASRec has RecBole's two layers."""
    device = torch.device(DEVICE)
    torch.manual_seed(0)
    model = model_of_a_step(name, ITEMS, device, 50, layers)
    return model, random_histories(batch, 50, ITEMS, device)


def training_step(
    name: str, dataset: str, batch: int, device: str, data_path: str = "dataset/", **keys: Any
) -> tuple[Callable[[], Any], int]:
    """A function that takes one step of our trainer and returns the terms of its loss, and the steps of an epoch."""
    from recbole_ssm.bench.train import _our_step
    from recbole_ssm.quick_start import configure

    options = {
        "train_batch_size": batch, "use_gpu": device == "cuda", "data_path": data_path, "show_progress": False,
        "checkpoint_dir": tempfile.gettempdir(), **keys,
    }  # fmt: skip
    torch.manual_seed(0)
    step, steps, _ = _our_step(configure(name, dataset, config_dict=options))
    return step, steps
