"""The memory that a process holds, and how it gives back what it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TUNABLES = "GLIBC_TUNABLES"
"""The variable from which glibc reads how it allocates, when a process starts; whoever has set it knows why."""


def allocator_settings() -> dict[str, str]:
    """The environment of a process that trains on the CPU, in which it uses freed memory again.

    PyTorch's blocks are aligned. What glibc cuts off at their ends lies in its caches of small blocks, and there it
    keeps freed neighbours from becoming one block (bug 14581, mended in 2.38): nothing freed is large enough for the
    next tensor, and each step takes new pages from the system. Without these caches a process trains faster and is
    smaller; docs/training.md has figures. Empty where that is not needed, where the variable is set, and where there is
    a GPU, for which a process mostly makes small blocks.
    """
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        old = library == "glibc" and tuple(map(int, version.split("."))) < (2, 38)
    except (AttributeError, ValueError, OSError):
        # Another C library.
        return {}
    gpu = any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg"))
    needed = old and not gpu and TUNABLES not in os.environ
    return {TUNABLES: "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"} if needed else {}


def restart_with_allocator_settings() -> None:
    """Begin this process once more, in the environment that :func:`allocator_settings` says, where it says one.

    A notebook or console that runs the program within itself, a program that comes from standard input, and a process
    that a debugger or profiler watches go on as they are. What a script did before it called this is done again.
    """
    program = sys.argv[0]
    as_module = ("-m", "recbole_ssm") in zip(sys.orig_argv, sys.orig_argv[1:])
    itself = as_module or (program in sys.orig_argv and Path(program).is_file())
    if itself and not _is_watched() and (more := allocator_settings()):
        # Without a new process training is slower, and no less right.
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **more})


def _is_watched() -> bool:
    monitoring: Any = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = map(monitoring.get_tool, range(6)) if monitoring else ()
    return any((sys.gettrace(), sys.getprofile(), *tools))


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: on a GPU what PyTorch held there, on a CPU the whole process."""
    if device.type == "cuda":
        from torch import cuda

        return int(cuda.max_memory_allocated(device))
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
