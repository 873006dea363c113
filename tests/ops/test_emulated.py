"""The C++ kernels built for ARM, run under QEMU: each op against the float64 reference, values and gradients."""

import ctypes
import pathlib
import re
import shutil
import struct
import subprocess

import pytest
import torch

from recbole_ssm.ops import native, selftest
from recbole_ssm.ops.backend import implementations

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
OPS = ["selective_scan", "selective_scan_last", "ssd", "ssd_last", "quasiseparable", "causal_conv1d"]
OPS += ["centered_conv1d", "dropout", "linear_cross_entropy", "rank_targets"]
ONE_CALL = ("linear_cross_entropy", "rank_targets")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)) or bool(native.unusable),
        reason=f"needs {COMPILER}, {EMULATOR} and built native kernels",
    ),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A process of the other machine, which runs one kernel after the other."""
    program = tmp_path_factory.mktemp("arm") / "kernels"
    csrc = pathlib.Path(native.__file__).parent.parent / "csrc"
    sources = [str(csrc / "library.cpp"), str(csrc / "kernels.cpp")]
    sources.append(str(pathlib.Path(__file__).with_name("emulated.cpp")))
    setup = (csrc.parent.parent / "setup.py").read_text()
    flags = [flag for line in re.findall(r"^FLAGS .*$", setup, re.M) for flag in re.findall(r'"(-[^"]+)"', line)]
    flags = [*flags, "-DVL=4", "-DKERNELS=kernels_baseline", f"-I{csrc}", "-static", "-pthread"]
    subprocess.run([COMPILER, *flags, *sources, "-o", str(program)], check=True)
    with subprocess.Popen([EMULATOR, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("op", OPS)
def test_arm(op, machine, monkeypatch):
    calls = []

    def run(name, backward, fields, refusal=None):
        calls.append(name)
        structure = native.structure(name, **fields)
        members = [member for member, _ in structure._fields_]
        words, memory = struct.unpack(f"<{len(members)}q", bytes(structure)), []
        rows = fields.get("rows", 0)
        kernel = ["scan", "ssd", "ssd_last", "conv", "dropout", "loss", "ranks"].index(name)
        machine.stdin.write(struct.pack("<4q", kernel, rows, backward, len(members)))
        for member, word in zip(members, words):
            tensor = fields.get(member)
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                size = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
                memory.append((tensor.data_ptr(), size))
                machine.stdin.write(struct.pack("<2q", 1, size) + ctypes.string_at(tensor.data_ptr(), size))
            else:
                machine.stdin.write(struct.pack("<2q", 0, word))
        machine.stdin.flush()
        assert machine.stdout.read(8) == bytes(8)
        for address, size in memory:
            ctypes.memmove(address, machine.stdout.read(size), size)

    monkeypatch.setattr(native, "_run", run)
    function = next(i.function for i in implementations(op, "native"))
    assert selftest.why_wrong(op, function, torch.device("cpu")) == ""
    assert len(calls) > (op not in ONE_CALL)  # forward and backward were there
