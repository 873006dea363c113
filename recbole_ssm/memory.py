"""The memory that a process holds, and how it gives back what it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: on a GPU what PyTorch held there, on a CPU the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


SPARE = 256 << 20
"""Bytes by which a process may grow before it gives free memory back: each page costs a fault when it is used again."""
_resident_before = 0


def return_memory_of_growth() -> None:
    """:func:`return_free_memory`, where the process has grown by more than :data:`SPARE` and a quarter since."""
    if _resident() > _resident_before + max(SPARE, _resident_before // 4):
        return_free_memory()


def return_free_memory() -> None:
    """Let glibc give back what is free.

    Its aligned allocations, of which PyTorch's are, seldom reuse freed blocks of other sizes
    (glibc bug 14581, mended in 2.38), and no two packed batches have the same sizes: the
    process grew by 29 MB a step on ml-1m, all of it free.
    """
    global _resident_before
    # Other C libraries have no such function.
    with contextlib.suppress(AttributeError, TypeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    _resident_before = _resident()


def _resident() -> int:
    """Bytes of the process that lie in memory now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
