"""The clock by which everything is timed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def now(device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds since some moment, once the device has finished what it was given.

    A GPU works on after the call that started it has returned, so without waiting its work would be timed elsewhere.

    Args:
        device: where the work that is timed runs.
        clock: what is read, such as ``time.process_time``.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return clock()
