"""The sizes of a kernel's tiles: a handful for each kernel, of which every GPU keeps the fastest.

Which one that is depends on the GPU, and nobody has tried them all. So the first call of a kernel
for arguments of a kind (their dtypes and dimensions, and the number and length of the sequences
to a power of four) times each. One takes the place of the first, which is what the self-test has
seen, where it is clearly faster and its results are the same; the choice is kept in a file, for
that GPU, that Triton and that text of the kernel. Elsewhere the first is taken: on a CPU, for
small calls, while a CUDA graph is recorded, and where PyTorch is told to be deterministic, because
sums in another order differ in their last digits.

Triton's own autotuner keeps its choices on disk in its newest versions only, cannot change the
memory that a tile asks for (a gradient has a share for each tile of channels), and times also
while a graph is recorded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import logging
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
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
"""Rows of a call that is worth the trial; the time of a smaller one is that of its launch."""
_RESULTS = {
    "scan.scan_forward": ("y", "final"),
    "scan.scan_backward": ("gx", "gdt", "gz", "gstate"),
    "scan.scan_last_forward": ("y",),
    "scan.scan_last_backward": ("gx", "gdt", "gz", "gstate"),
    "ssd.ssd_forward": ("y", "final"),
    "ssd.ssd_backward": ("gx", "gdt", "gA", "gB", "gC", "gskip", "gstate"),
    "ssd.ssd_last_forward": ("y",),
    "ssd.ssd_last_backward": ("gx", "gdt", "gA", "gB", "gC", "gskip", "gstate"),
    "conv.conv_forward": ("y",),
    "conv.conv_gradient": ("gsum",),
}
"""What each kernel writes into the values that it is given, as far as results are compared."""
_TOLERANCE = 0.01
"""How far results may differ, over the largest of them: rounding, but no mistake, stays far below."""
_GAIN = 0.95
"""The time of a tile over that of the first one, above which the first is kept."""
_ROUNDS = 5
_DIMENSIONS = ("N", "P", "H", "G", "D", "K", "PRECISION")
_DTYPES = ("x", "dt", "B", "weight")

_lock = threading.Lock()
_chosen: dict[tuple[Any, ...], Tile] = {}
"""What this process takes, by kind of call."""


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
    if len(tiles) == 1 or not _matters(values):
        return run(tiles[0])
    kind = _kind(kernel, values)
    tile = _chosen.get(kind)
    if tile is None:
        with _lock, torch.cuda.device(values["x"].device):
            name = _name(kind)
            tile = _chosen.get(kind) or next((t for t in tiles if t == kept().get(name)), None)
            if tile is None and repeatable and not torch.cuda.is_current_stream_capturing():
                tile = _fastest(kernel, values, tiles, run)
                if tile is not None:
                    _keep(name, tile)
            if tile is not None:
                _chosen[kind] = tile
    return run(tile or tiles[0])


def file() -> Path:
    """Where choices are kept: in the folder RECBOLE_SSM_CACHE, or else in the user's for caches."""
    own, caches = os.environ.get("RECBOLE_SSM_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(own or f"{caches}/recbole_ssm", "tiles.json").expanduser()
    except RuntimeError:  # the user has no home
        return Path(tempfile.gettempdir(), "recbole_ssm", "tiles.json")


@functools.cache
def kept() -> dict[str, Tile]:
    """The tiles chosen so far, by the name of a kind: those of the file, which is read once, and of this process."""
    return _read()


def _read() -> dict[str, Tile]:
    """What the file says; nothing where it is broken, or another program's."""
    with suppress(OSError, ValueError):
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
    dtypes = tuple(values[name].dtype for name in _DTYPES if name in values)
    dimensions = tuple(values.get(name) for name in _DIMENSIONS)
    S = max(values["S"], 1)
    powers = tuple((size.bit_length() + 1) // 2 for size in (S, values["rows"] // S))
    return kernel, dtypes, dimensions, powers, values["x"].device


def _name(kind: tuple[Any, ...]) -> str:
    """A kind in words."""
    kernel, dtypes, dimensions, (S, L), device = kind
    words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    words += [f"{name}={size}" for name, size in zip(_DIMENSIONS, dimensions) if size is not None]
    return " ".join([kernel, _text_of(kernel), *words, f"S<4^{S}", f"L<4^{L}", machine(device)])


@functools.cache
def _text_of(kernel: str) -> str:
    """The first digits of the digest of a kernel's file."""
    file = Path(__file__).with_name(f"{kernel.partition('.')[0]}.py")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


@functools.cache
def machine(device: torch.device) -> str:
    """The GPU and the Triton that a choice is of."""
    major, minor = torch.cuda.get_device_capability(device)
    version = importlib.import_module("triton").__version__
    return f"on {torch.cuda.get_device_name(device)} ({major}.{minor}), Triton {version}"


def _fastest(kernel: str, values: Values, tiles: Sequence[Tile], run: Callable[[Tile], Any]) -> Tile | None:
    """The first tile, or one that is clearly faster and gives the same; None where this call cannot tell."""
    times = [milliseconds(functools.partial(run, tile)) for tile in tiles]
    if times[0] == float("inf"):
        return None
    best_tile = tiles[0]
    try:
        expected = [t.clone() for t in _results(kernel, values, run(tiles[0]))]
        if not all(bool(t.isfinite().all()) for t in expected):
            return None
        best_time = _GAIN * times[0]
        for tile, time in zip(tiles[1:], times[1:]):
            if time < best_time and all(map(_alike, _results(kernel, values, run(tile)), expected)):
                best_tile, best_time = tile, time
    except torch.OutOfMemoryError:
        return None
    told = ", ".join(f"{tile} {time:.3g} ms" for tile, time in zip(tiles, times))
    logging.getLogger().debug(f"{kernel} takes {best_tile} of {told}")
    return best_tile


def _results(kernel: str, values: Values, shares: Mapping[str, Tensor | None] | None) -> list[Tensor]:
    """What a kernel has written; gradients of parameters as the sums of the shares that it returned."""
    written = [values.get(name) for name in _RESULTS[kernel]]
    sums = [t.sum(0) for name, t in (shares or {}).items() if t is not None and name != "scratch"]
    return [t for t in (*written, *sums) if t is not None]


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether numbers differ by no more than rounding."""
    return bool((found.float() - expected).abs().max() <= _TOLERANCE * expected.abs().max()) if found.numel() else True


def _keep(name: str, tile: Tile) -> None:
    kept()[name] = tile
    with suppress(OSError):
        # other processes may have written theirs
        write_json(file(), _read() | {name: tile})


def milliseconds(run: Callable[[], Any]) -> float:
    """The median time of a call on the GPU, once compiled; infinite where it does not compile or start."""
    try:
        run()
        # While the GPU sleeps for some milliseconds, Python launches what is timed.
        torch.cuda._sleep(10_000_000)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        events[-1].synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(events))
    except Exception:  # whatever a compiler or a driver raises
        return float("inf")
