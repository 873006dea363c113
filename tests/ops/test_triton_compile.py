"""The Triton kernels compile for real GPUs: that needs the compiler alone, and no GPU.

Packed and padded, in every precision. What Python says of a kernel is read in moments; to make the program of a GPU
takes seconds to half a minute, so that is slow, as is every Triton but the one installed.
"""

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_ssm.ops.triton import INTERPRETED
from recbole_ssm.ops.triton.tiles import TILES
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None, reason="Triton is not installed, or interprets"
)

# Bytes of shared memory that a program may have, by compute capability.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes of the stack of a thread, where more registers would be needed than there are: twice what was found for sm_90
# with Triton 3.9, rounded up to a power of two. Of the other GPUs ssd_forward needs most, 1,400 for sm_80.
STACK = {
    "scan_backward": 2048,
    "ssd_forward": 2048,
    "ssd_backward": 8192,
    "ssd_added": 16,
    "loss_forward": 512,
    "loss_output": 2048,
    "loss_items": 2048,
}
# The programs for sm_100 keep more in registers at once: 184 bytes in float32.
STACK_100 = {**STACK, "scan_last_backward": 256}
SCAN = {"SOFTPLUS": True, "BN": 32, "BD": 32}
SSD = {"REVERSE": True, "SHIFT": True, "ADD": True, "Q": 32}
CONV = {"SILU": True, "LEAD": 3, "K": 4, "BT": 32, "BD": 32}
LOSS = {"BR": 64, "BV": 64, "BK": 64}
GRADIENT = {**LOSS, "BD": 128, "SAMPLED": False}
STATE = {"K": 4, "BK": 4, "BD": 32}
KERNELS = [
    ("scan", "scan_forward", {**SCAN, "CHUNK": 16}, 1),
    ("scan", "scan_backward", {**SCAN, "CHUNK": 16}, 1),
    ("scan", "scan_added", {**SCAN, "BACKWARD": False}, 1),
    ("scan", "scan_added", {**SCAN, "BACKWARD": True}, 1),
    ("scan", "scan_last_forward", SCAN, 1),
    ("scan", "scan_last_backward", SCAN, 1),
    ("ssd", "ssd_forward", {**SSD, "BN": 64, "BP": 64}, 8),
    ("ssd", "ssd_backward", {**SSD, "BN": 64, "BP": 64}, 8),
    ("ssd", "ssd_forward", {**SSD, "Q": 16, "BN": 128, "BP": 64}, 8),
    ("ssd", "ssd_backward", {**SSD, "Q": 16, "BN": 128, "BP": 64}, 8),
    ("ssd", "ssd_forward", {**SSD, "BN": 32, "BP": 32}, 8),
    ("ssd", "ssd_backward", {**SSD, "BN": 32, "BP": 32}, 8),
    ("ssd", "ssd_added", {**SSD, "BACKWARD": False, "BN": 64, "BP": 64}, 8),
    ("ssd", "ssd_added", {**SSD, "BACKWARD": True, "Q": 16, "BN": 128, "BP": 64}, 8),
    ("common", "join", {"REVERSE": True, "BLOCK": 128}, 4),
    ("ssd", "ssd_last_forward", {"Q": 32, "BN": 64, "BP": 64}, 4),
    ("ssd", "ssd_last_backward", {"Q": 32, "BN": 64, "BP": 64}, 4),
    ("loss", "loss_forward", LOSS, 4),
    ("loss", "loss_settle", {"BR": 64, "SAMPLED": True}, 4),
    ("loss", "loss_output", GRADIENT, 4),
    ("loss", "loss_output", {**GRADIENT, "SAMPLED": True}, 4),
    ("loss", "loss_items", GRADIENT, 4),
    ("loss", "loss_items", {**GRADIENT, "bias": None}, 4),
    ("conv", "conv_forward", CONV, 4),
    ("conv", "conv_gradient", CONV, 4),
    ("conv", "conv_state", STATE, 4),
    ("conv", "conv_state_gradient", STATE, 4),
]
TILED = [
    (module, name, {**constants, **tile}, tile.get("warps", warps))
    for module, name, constants, warps in KERNELS
    for tile in TILES.get(f"{module}.{name}", ())[1:]
    if not name.startswith("ssd") or constants["BN"] * constants["BP"] <= 256 * tile["warps"] or "last" in name
]
"""The other tiles that a GPU may find to be faster; SSD's as :func:`operators._ssd_tiles` says."""
OPTIONAL = ("offsets", "of_row", "of_piece", "ids")
TYPES = {
    "offsets": "*i64",
    "of_row": "*i32",
    "of_piece": "*i64",
    "first": "*i64",
    "target": "*i64",
    "ids": "*i64",
    "hot": "fp32",
}
NUMBERS = {"rows", "L", "D", "N", "S", "H", "P", "per_group", "groups", "sx", "sdt", "sB", "sC", "sz", "sgy"}
NUMBERS |= {"n", "V", "d", "tiles", "shares", "cells", "columns", "alike"}
# What comes in the precision of the model, and so do their gradients; all else is float32.
OF_THE_MODEL = {"x", "dt", "B", "C", "z", "y", "gy", "gx", "gdt", "gz", "weight", "bias", "output", "items"}
OLDER = ("3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
"""Every Triton that comes with PyTorch 2.6 and later, and the newest."""

each_kernel = pytest.mark.parametrize(("module", "name", "constants", "warps"), KERNELS + TILED)
packed_and_padded = pytest.mark.parametrize("packed", [True, False])
each_type = pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])


def source_of(module, name, constants, packed, dtype):
    """What Triton compiles: a kernel, with the types of its arguments and its constants."""
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"recbole_ssm.ops.triton.{module}"), name)
    types = {**TYPES, **dict.fromkeys(NUMBERS, "i32"), **dict.fromkeys(OF_THE_MODEL, f"*{dtype}")}
    constants = {**constants, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
    constants = {a: value for a, value in constants.items() if a in kernel.arg_names}
    if not packed:
        constants |= {a: None for a in OPTIONAL if a in kernel.arg_names}
    signature = {a: "constexpr" if a in constants else types.get(a, "*fp32") for a in kernel.arg_names}
    if "constants" in inspect.signature(ASTSource).parameters:
        # Triton 3.2.
        return ASTSource(kernel, {a: kind for a, kind in signature.items() if a not in constants}, constants)
    return ASTSource(kernel, signature, constexprs=constants)


def by_name(function, values):
    """Call a function of Triton's, whose parameters are not the same in all versions."""
    return function(*[values[parameter] for parameter in inspect.signature(function).parameters])


@each_type
@packed_and_padded
@each_kernel
def test_triton_reads_it(module, name, constants, warps, packed, dtype):
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    given = {"target": target, "context": context, "module_map": backend.get_module_map()}
    given["options"] = backend.parse_options({"num_warps": warps, "num_stages": 1})
    given["codegen_fns"] = by_name(backend.get_codegen_implementation, given)
    assert name in str(by_name(source_of(module, name, constants, packed, dtype).make_ir, given))


def stack_of(cubin, folder):
    """Bytes of stack that a thread of a program takes: 0 where no register is spilled."""
    import triton

    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", said.stdout)[1])


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@each_type
@packed_and_padded
@each_kernel
def test_it_fits_a_gpu(module, name, constants, warps, packed, dtype, capability, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget

    source = source_of(module, name, constants, packed, dtype)
    options = {"num_warps": warps, "num_stages": 1}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED[capability]
    assert stack_of(compiled.asm["cubin"], tmp_path) <= (STACK_100 if capability == 100 else STACK).get(name, 0)


@pytest.mark.slow
@pytest.mark.skipif("COMPILED_BY" in os.environ, reason="this is such a process")
@pytest.mark.parametrize("version", OLDER)
def test_every_triton(version, tmp_path):
    """Its wheel, of some 250 MB, in a folder of its own; the tests above in a process of its own."""
    folder = tmp_path / version
    wheel = ["pip", "install", "-q", "--no-deps", "--target", str(folder), f"triton=={version}"]
    subprocess.run([sys.executable, "-m", *wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}", "COMPILED_BY": version}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", "tests/ops/test_triton_compile.py"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-4000:]


@pytest.mark.skipif("COMPILED_BY" not in os.environ, reason="for the processes of test_every_triton")
def test_it_is_the_triton_that_was_asked_for():
    import triton

    assert triton.__version__ == os.environ["COMPILED_BY"]
