"""The Triton kernels compile for real GPUs and fit their shared memory: that needs the compiler alone, and no GPU."""

import importlib
import importlib.util

import pytest

from recbole_ssm.ops.triton import INTERPRETED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        INTERPRETED or importlib.util.find_spec("triton") is None, reason="Triton is not installed, or interprets"
    ),
]

SHARED = {89: 99 * 1024, 90: 227 * 1024}  # bytes that a program may have, by compute capability
SCAN = {"SOFTPLUS": True, "BN": 32, "BD": 32}
SSD = {"REVERSE": True, "SHIFT": True, "ADD": True, "PRECISION": "tf32x3", "Q": 32}
CONV = {"SILU": True, "LEAD": 3, "K": 4, "BT": 32, "BD": 32}
LOSS = {"BR": 64, "BV": 64, "BK": 64, "PRECISION": "tf32x3"}
GRADIENT = {**LOSS, "BD": 128, "SAMPLED": False}
STATE = {"K": 4, "BK": 4, "BD": 32}
KERNELS = [
    ("scan", "scan_forward", {**SCAN, "CHUNK": 16}, 1),
    ("scan", "scan_backward", {**SCAN, "CHUNK": 16}, 1),
    ("scan", "scan_last_forward", SCAN, 1),
    ("scan", "scan_last_backward", SCAN, 1),
    ("ssd", "ssd_forward", {**SSD, "BN": 64, "BP": 64}, 8),
    ("ssd", "ssd_backward", {**SSD, "BN": 64, "BP": 64}, 8),
    ("ssd", "ssd_forward", {**SSD, "Q": 16, "BN": 128, "BP": 64}, 8),
    ("ssd", "ssd_backward", {**SSD, "Q": 16, "BN": 128, "BP": 64}, 8),
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
OPTIONAL = ("offsets", "of_row", "ids")
TYPES = {"offsets": "*i64", "of_row": "*i32", "x": "*bf16", "target": "*i64", "ids": "*i64", "hot": "fp32"}
NUMBERS = {"rows", "L", "D", "N", "S", "H", "P", "per_group", "groups", "sx", "sdt", "sB", "sC", "sz", "sgy"}
NUMBERS |= {"n", "V", "d", "tiles", "shares"}


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("module", "name", "constants", "warps"), KERNELS)
def test_compiles(module, name, constants, warps, packed, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"recbole_ssm.ops.triton.{module}"), name)
    types = {**TYPES, **dict.fromkeys(NUMBERS, "i32")}
    if not packed:
        constants = {**constants, **{a: None for a in OPTIONAL if a in kernel.arg_names}}
    signature = {a: "constexpr" if a in constants else types.get(a, "*fp32") for a in kernel.arg_names}
    options = {"num_warps": warps, "num_stages": 1}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED[capability]
