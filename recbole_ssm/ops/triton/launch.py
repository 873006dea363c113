"""How the operators start a kernel, and what they measure it by.

Triton is imported when the first kernel runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(kernel: str, grid: tuple[int, int], values: Mapping[str, Any]) -> None:
    """Run a kernel, for example ``"scan.scan_forward"``, unless its grid is empty.

    ``values`` has an entry for every parameter of the kernel, and may have others. ``warps`` is
    how many a program has, if not four.
    """
    module, _, name = kernel.partition(".")
    function = getattr(importlib.import_module(f"recbole_ssm.ops.triton.{module}"), name)
    arguments = [values[parameter] for parameter in function.arg_names]
    x = values["x"]
    if grid[0] and grid[1]:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            function[grid](*arguments, num_warps=values.get("warps", 4), num_stages=1)


def width(size: int, least: int = 1) -> int:
    """The next power of two, as blocks must have."""
    return max(least, 1 << (size - 1).bit_length()) if size else least


def empty_float32(x: Tensor, *shape: int) -> Tensor:
    """New memory in float32, on the device of x."""
    return x.new_empty(shape, dtype=torch.float32)


def cdiv(size: int, block: int) -> int:
    """How many blocks cover so many elements."""
    return -(-size // block)


def processors(x: Tensor) -> int:
    """Multiprocessors of the GPU of x; none on the CPU, where the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 0
