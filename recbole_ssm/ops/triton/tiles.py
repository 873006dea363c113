"""The sizes of a kernel's tiles: a handful for each kernel, of which every GPU keeps the fastest.

Which one that is depends on the GPU, and nobody has tried them all. So the first call of a kernel
for arguments of a kind (their dtypes and dimensions, and the number and length of the sequences
to a power of four) times each, leaves out those whose results differ from the first one's, and
keeps the choice in a file, for that GPU and that Triton.
Elsewhere the first of the handful is taken: on a CPU, for small calls, while a CUDA graph is
recorded, and where PyTorch is told to be deterministic, because sums in another order differ in
their last digits.

Triton's own autotuner keeps its choices on disk in its newest versions only, cannot change the
memory that a tile asks for (a gradient has a share for each tile of channels), and times also
while a graph is recorded.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.files import write_json
from recbole_ssm.ops.library import Values

Tile = dict[str, int]
_SCAN = ({"BD": 32, "warps": 1}, {"BD": 16, "warps": 1}, {"BD": 32, "warps": 2})
_SSD = ({"warps": 8}, {"warps": 4})
_SSD_LAST = ({"Q": 32, "warps": 4}, {"Q": 64, "warps": 8})
_CONV = (
    {"BT": 32, "BD": 32, "warps": 4},
    {"BT": 64, "BD": 32, "warps": 8},
    {"BT": 16, "BD": 64, "warps": 4},
)
TILES: dict[str, tuple[Tile, ...]] = {
    "scan.scan_forward": _SCAN,
    "scan.scan_backward": _SCAN,
    "scan.scan_added": _SCAN[:1],
    "scan.scan_last_forward": _SCAN,
    "scan.scan_last_backward": _SCAN,
    "ssd.ssd_forward": _SSD,
    "ssd.ssd_backward": _SSD,
    "ssd.ssd_added": _SSD[:1],
    "ssd.ssd_last_forward": _SSD_LAST,
    "ssd.ssd_last_backward": _SSD_LAST,
    "conv.conv_forward": _CONV,
    "conv.conv_gradient": _CONV,
    "conv.conv_state": _CONV[:1],
    "conv.conv_state_gradient": _CONV[:1],
}
"""By kernel, the first being what is taken unless another was found to be faster."""
LEAST = 2048
"""Rows of a call whose time depends on its tiles; a smaller one is over before the next is launched."""
_ROUNDS = 3
_DIMENSIONS = ("N", "P", "H", "G", "D", "K", "PRECISION")
_DTYPES = ("x", "dt", "B", "weight")
_RESULTS = (
    "y",
    "final",
    "gx",
    "gdt",
    "gz",
    "gA",
    "gB",
    "gC",
    "gskip",
    "gdt_bias",
    "gsum",
    "gweight",
    "gbias",
    "gstate",
)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""How far results may differ from those of the first tile, which the self-test has tried: sums are in another order."""
_lock = threading.Lock()


def best(
    kernel: str, values: Values, tiles: Sequence[Tile], run: Callable[[Tile], Any], repeatable: bool = True
) -> Any:
    """What ``run`` returns of the fastest tile for such a call.

    Args:
        kernel: its name, as in :data:`TILES`.
        values: what the kernel is given, as in :func:`recbole_ssm.ops.triton.launch.launch`.
        tiles: the sizes to choose from; the first is the default.
        run: runs the kernel with one of them.
        repeatable: whether it may run several times: a kernel that adds to what it is given may
            not, and takes what was chosen for one that does not.
    """
    if not _matters(values):
        return run(tiles[0])
    kind = _kind(kernel, values)
    tile = chosen().get(kind)
    if tile is None:
        with _lock, torch.cuda.device(values["x"].device):
            name = _name(kind)
            may_try = repeatable and not torch.cuda.is_current_stream_capturing()
            if kept().get(name) not in tiles and may_try:
                _try(name, values, tiles, run)
            tile = next((t for t in tiles if t == kept().get(name)), None)
            if tile:
                chosen()[kind] = tile
    return run(tile or tiles[0])


def file() -> Path:
    """Where choices are kept: in the folder RECBOLE_SSM_CACHE, or else in the user's for caches."""
    own, caches = os.environ.get("RECBOLE_SSM_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{caches}/recbole_ssm", "tiles.json").expanduser()


@functools.cache
def chosen() -> dict[tuple[Any, ...], Tile]:
    """The tiles that this process has found to be the fastest, by kind of call."""
    return {}


@functools.cache
def kept() -> dict[str, Tile]:
    """The tiles chosen so far, by the name of a kind: those of the file, which is read once, and of this process."""
    return _read()


def _read() -> dict[str, Tile]:
    """What the file says; nothing where it is broken, or another program's."""
    with suppress(OSError, RuntimeError, ValueError):
        found = json.loads(file().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _matters(values: Values) -> bool:
    """Whether a call is one for which tiles are chosen."""
    if not values["x"].is_cuda or values["rows"] < LEAST or os.environ.get("RECBOLE_SSM_TILES") == "default":
        return False
    return not torch.are_deterministic_algorithms_enabled()


def _kind(kernel: str, values: Values) -> tuple[Any, ...]:
    """What a choice holds for: kernel, dtypes, dimensions, powers of four above number and length, and device."""
    dtypes = [values[name].dtype for name in _DTYPES if name in values]
    dimensions = [values.get(name) for name in _DIMENSIONS]
    S = max(values["S"], 1)
    powers = [(size.bit_length() + 1) // 2 for size in (S, values["rows"] // S)]
    return kernel, *dtypes, *dimensions, *powers, values["x"].device


def _name(kind: tuple[Any, ...]) -> str:
    """A kind in words."""
    kernel, *dtypes, S, L, device = kind
    dimensions = zip(_DIMENSIONS, dtypes[-len(_DIMENSIONS) :])
    words = [str(dtype)[6:] for dtype in dtypes[: -len(_DIMENSIONS)]]
    words += [f"{name}={size}" for name, size in dimensions if size is not None]
    return " ".join([kernel, *words, f"S<4^{S}", f"L<4^{L}", _machine(device)])


@functools.cache
def _machine(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    version = importlib.import_module("triton").__version__
    return f"on {torch.cuda.get_device_name(device)} ({major}.{minor}), Triton {version}"


def _try(name: str, values: Values, tiles: Sequence[Tile], run: Callable[[Tile], Any]) -> None:
    """Time all tiles and keep the fastest; the first, and in this process only, where it does not run."""
    times: list[float] = []
    expected: list[Tensor] | None = None
    for tile in tiles:
        times.append(milliseconds(functools.partial(run, tile)))
        found = _results(values, tile, run) if times[-1] < float("inf") else None
        expected = found if len(times) == 1 else expected
        if found is None or expected is None or not all(map(_alike, found, expected)):
            times[-1] = float("inf")
    tile = kept()[name] = tiles[times.index(min(times))]
    logging.getLogger().debug(f"{name}: {tile} is the fastest of {len(tiles)}")
    if min(times) < float("inf"):
        with suppress(OSError, RuntimeError):
            # other processes may have written theirs
            write_json(file(), _read() | {name: tile})


def _results(values: Values, tile: Tile, run: Callable[[Tile], Any]) -> list[Tensor] | None:
    """Copies of what a kernel writes with a tile, gradients of parameters as the sums of their shares; None where there
    is no room for them.
    """
    try:
        shares = run(tile) or {}
        written = [values.get(name) for name in _RESULTS]
        sums = [shares[name].sum(0) for name in _RESULTS if shares.get(name) is not None]
        return [t.clone() for t in (*written, *sums) if t is not None]
    except torch.OutOfMemoryError:
        return None


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether numbers differ by no more than their order in sums can explain."""
    difference = torch.where(found == expected, 0, (found.float() - expected.float()).abs())
    return bool((difference <= _TOLERANCE[found.dtype] * expected.float().abs().max()).all())


def milliseconds(run: Callable[[], Any]) -> float:
    """The time of a call on the GPU, once compiled; infinite where it does not compile or start."""
    try:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        # While the GPU sleeps for a millisecond, Python launches what is timed.
        torch.cuda._sleep(2_000_000)
        begin.record()
        for _ in range(_ROUNDS):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / _ROUNDS
    except Exception:  # whatever a compiler or a driver raises
        return float("inf")
