"""The C++ kernels: every instruction set of this machine, odd shapes and memory, threads, processes, sanitizers."""

import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from recbole_ssm import ops
from recbole_ssm.layers import Hydra, Mamba, Mamba2
from recbole_ssm.ops import native, selftest
from recbole_ssm.ops.packing import cu_seqlens_of
from tests.conftest import REPOSITORY
from tests.ops.test_ops import OPS, arguments, assert_close, each_op, values_and_gradients

pytestmark = pytest.mark.skipif(bool(native.unusable), reason=f"native kernels: {native.unusable}")


def a_call(data, op):
    """Arguments of random sizes, with a vector's whole and broken widths, and bounds or None."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    G = data.draw(st.integers(1, 3))
    sizes = (
        data.draw(st.sampled_from([1, 3, 8, 16, 17, 40])),
        data.draw(st.sampled_from([1, 2, 5, 16, 33])),
        G * data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 3, 16, 20])),
        G,
        data.draw(st.integers(1, 7)),
    )
    if data.draw(st.booleans(), label="packed"):
        lengths = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=40).filter(any))
        return *arguments(op, 1, sum(lengths), len(lengths), sizes=sizes), cu_seqlens_of(torch.tensor(lengths))
    batch, L = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([1, 2, 63, 64, 65, 130]))
    return *arguments(op, batch, L, batch, sizes=sizes), None


@each_op
@given(data=st.data())
def test_any_shape_equals_the_reference(op, instruction_set, data):
    tensors, keywords, cu_seqlens = a_call(data, op)
    expected = values_and_gradients(op, "torch", tensors, keywords, torch.float64, cu_seqlens)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: whatever a kernel leaves unwritten shows
    try:
        found = values_and_gradients(op, "native", tensors, keywords, torch.float32, cu_seqlens)
    finally:
        torch.use_deterministic_algorithms(False)
    for f, e in zip(found, expected):
        # a gradient of one number is a sum over all tokens that may cancel, so its digits count from 1 on, and fewer
        scale = max(1.0, e.abs().max().item() if e.numel() else 0)
        torch.testing.assert_close(f.double(), e, rtol=0, atol=scale * (3e-5 if e.numel() > 1 else 1e-4))


@each_op
@given(data=st.data())
def test_threads_do_not_change_a_byte(op, data):
    tensors, keywords, cu_seqlens = a_call(data, op)
    results, grain = [], native.GRAIN
    native.GRAIN = 1e-9  # small calls start threads too
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(values_and_gradients(op, "native", tensors, keywords, torch.float32, cu_seqlens))
    torch.set_num_threads(1)
    native.GRAIN = grain
    for one, *others in zip(*results):
        for other in others:
            assert torch.equal(one, other)


def test_small_calls_run_on_one_thread(monkeypatch):
    """Whatever PyTorch may use; a long call gets all of it, and the kernels are told."""
    asked = []
    run, size = native._kernels["scan"]
    monkeypatch.setitem(
        native._kernels, "scan", (lambda call, *rest: asked.append(call.threads) or run(call, *rest), size)
    )
    torch.set_num_threads(5)
    for L in (50, 400, 20_000):
        tensors, keywords = arguments(ops.selective_scan, 1, L, 1, torch.float32, sizes=(16, 16, 1, 1, 1, 4))
        with ops.use_backend("native"):
            ops.selective_scan(*tensors, **keywords)
    torch.set_num_threads(1)
    assert asked == [1, 1, 5]


def crooked(t):
    """The same values in rows that begin at no whole float."""
    raw = bytearray(t.numel() * 4 + 1)
    view = torch.frombuffer(raw, dtype=torch.uint8)[1:].view(-1)
    view.copy_(t.contiguous().view(-1).view(torch.uint8))
    return torch.frombuffer(raw, dtype=torch.float32, offset=1).view(t.shape)


MEMORY = {
    "one float off": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "no whole float": crooked,
    "a slice of wider rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
}


@each_op
def test_memory_may_lie_anyhow(op, instruction_set):
    torch.manual_seed(0)
    tensors, keywords = arguments(op, 3, 20, 3, torch.float32)
    with ops.use_backend("native"):
        expected = op(*tensors, **keywords)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for form in MEMORY.values():
            found = op(*map(form, tensors), **{k: form(v) if torch.is_tensor(v) else v for k, v in keywords.items()})
            for f, e in zip(found if isinstance(found, tuple) else (found,), expected):
                assert_close(f, e, 1e-6)  # softplus before ssd is PyTorch's, and differs with the layout
        row = tensors[0][:, :1].expand_as(tensors[0])
        for f, e in zip(op(row, *tensors[1:], **keywords), op(row.contiguous(), *tensors[1:], **keywords)):
            assert torch.equal(f, e)


@each_op
def test_nan_stays_visible(op, instruction_set):
    for index in range(4):
        tensors, keywords = arguments(op, 1, 5, 1, torch.float32)
        if index < len(tensors):
            tensors[index].view(-1)[tensors[index].numel() // 2] = torch.nan
            with ops.use_backend("native"):
                out = op(*tensors, **keywords)
            assert (out[0] if isinstance(out, tuple) else out).isnan().any(), index


@each_op
def test_torch_sees_through_the_operators(op):
    """Fake kernels, autograd registration and compilation without a graph break."""
    tensors, keywords = arguments(op, 2, 6, 2, torch.float32)
    tensors = [t.requires_grad_() for t in tensors]

    def loss(*tensors):
        out = op(*tensors, **keywords)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    with ops.use_backend("native"):
        expected = torch.autograd.grad(loss(*tensors), tensors)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for f, e in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
            torch.testing.assert_close(f, e)


def test_operators_keep_the_rules_of_torch_library():
    x, weight, bias = arguments(ops.causal_conv1d, 2, 6, 2, torch.float32)[0]
    torch.library.opcheck(
        torch.ops.recbole_ssm.causal_conv1d.default,
        (x.requires_grad_(), weight.requires_grad_(), bias, None, None, "silu"),
    )
    x, dt, A, B, C, skip, z = (t.requires_grad_() for t in arguments(ops.selective_scan, 2, 6, 2, torch.float32)[0])
    scan = torch.ops.recbole_ssm.selective_scan.default
    torch.library.opcheck(scan, (x, dt, A, B, C, skip, z, None, None, None, True, True))
    x, dt, A, B, C, skip = (t.requires_grad_() for t in arguments(ops.ssd, 2, 6, 2, torch.float32)[0])
    torch.library.opcheck(torch.ops.recbole_ssm.ssd.default, (x, dt.abs(), A, B, C, skip, None, None, True, True))


def test_operators_refuse_what_does_not_fit():
    """Whoever calls them past the public functions gets an error, not a crash."""
    x, weight, bias = arguments(ops.causal_conv1d, 2, 6, 2, torch.float32)[0]
    with pytest.raises(ValueError, match="bias must have shape"):
        torch.ops.recbole_ssm.causal_conv1d(x, weight, bias[:-1], None, None, "silu")
    library, wide = torch.ops.recbole_ssm, weight.repeat(1, 5)[:, :17]
    with pytest.raises(ValueError, match="causal_conv1d: no kernel for 17 taps"):
        library.causal_conv1d(x, wide, bias, None, None, "silu")
    with pytest.raises(ValueError, match="centered_conv1d: no kernel for 17 taps"):
        library.centered_conv1d(x, wide, bias, None, "silu")
    for bounds in ([0, 4, 3, 6], [0, 7], [1, 6], [-1, 6]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the total length 6"):
            torch.ops.recbole_ssm.causal_conv1d(x[:1], weight, bias, None, torch.tensor(bounds), "silu")


def test_operators_refuse_other_precision():
    x, dt, A, B, C, *_ = (t.double() for t in arguments(ops.selective_scan, 2, 6, 2, torch.float32)[0])
    with pytest.raises(ValueError, match="float32, not torch.float64 as given for x"):
        torch.ops.recbole_ssm.selective_scan(x, dt, A, B, C, None, None, None, None, None, False, False)


@pytest.mark.parametrize("groups", [0, 2])
def test_operators_refuse_groups_that_do_not_divide_the_heads(groups):
    x, dt, A, maps = torch.randn(1, 5, 3, 4), torch.rand(1, 5, 3), -torch.rand(3), torch.randn(1, 5, groups, 2)
    with pytest.raises(ValueError, match=f"the {groups} groups of B must divide the 3 heads"):
        torch.ops.recbole_ssm.ssd(x, dt, A, maps, maps, None, None, None, True, False)
    with pytest.raises(ValueError, match=f"the {groups} groups of B must divide the 3 heads"):
        torch.ops.recbole_ssm.ssd_last(x, dt, A, maps, maps[:, 0], None, None)


@pytest.mark.parametrize("mixer", [Mamba(8, 4, 4, 2), Mamba2(8, 4, 4, 2, 8), Hydra(8, 4, 7, 2, 8)])
def test_a_program_exported_without_gradients_refuses_a_backward(mixer):
    with torch.no_grad():
        program = torch.export.export(mixer, (torch.randn(2, 90, 8),)).module()
    u = torch.randn(2, 90, 8)
    y = program(u)[0]
    assert torch.equal(y, mixer(u)[0])
    with pytest.raises(ValueError, match="kept no states for a backward"):
        y.sum().backward()


def test_no_heads_are_no_work():
    maps = torch.randn(2, 5, 1, 4)
    with ops.use_backend("native"):
        y, state = ops.ssd(torch.randn(2, 5, 0, 3), torch.rand(2, 5, 0), torch.zeros(0), maps, maps)
    assert y.shape == (2, 5, 0, 3) and state.shape == (2, 0, 3, 4)


@each_op
def test_a_second_derivative_is_an_error(op):
    tensors, keywords = arguments(op, 2, 6, 2, torch.float32)
    tensors = [t.requires_grad_() for t in tensors]
    with ops.use_backend("native"):
        out = op(*tensors, **keywords)
        out = out[0] if isinstance(out, tuple) else out
        (gradient,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    "op", [*(op.__name__ for op in OPS), "dropout", "linear_cross_entropy", "rank_targets", "step", "history"]
)
def test_where_pytorch_makes_new_tensors_does_not_matter(op):
    example = selftest._example(op, torch.device("cpu"), 2, 5)
    with ops.use_backend("native"):
        expected = selftest._evaluate(example.call, example.tensors, 1)
        with torch.device("meta"):
            found = selftest._evaluate(example.call, example.tensors, 1)
    assert torch.equal(found[0], expected[0]) and all(map(torch.equal, found[1], expected[1]))


def test_memory_of_another_device_is_not_read():
    output, items, target = torch.randn(6, 3), torch.randn(9, 3), torch.arange(6)
    for tensors in ((output.to("meta"), items, target), (output, items, target.to("meta"))):
        assert not native._takes(*tensors)
        with pytest.raises(ValueError, match="native kernels read the CPU's memory; move the tensor .* from meta"):
            native._ranks(*tensors, None, None, None)


def test_bounds_are_checked_before_memory_is_made_for_them():
    tensors, _ = arguments(ops.selective_scan, 1, 6, 2, torch.float32)
    for bounds in ([0, 2**40, 6], [0, 3, 2**40]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the total length 6"):
            torch.ops.recbole_ssm.selective_scan(*tensors, None, None, torch.tensor(bounds), True, True)


def test_tangents_are_not_lost():
    """PyTorch drops them at an operator of its library, so the kernels leave forward differentiation to it."""
    tensors, keywords = arguments(ops.ssd, 2, 6, 2, torch.float32)

    def along(backend):
        with ops.use_backend(backend):
            return torch.func.jvp(lambda x: ops.ssd(x, *tensors[1:], **keywords)[0], (tensors[0],), (tensors[0],))[1]

    assert along("native").abs().max() > 0
    assert torch.equal(along("native"), along("torch"))


@pytest.mark.parametrize("mixer", [Mamba(8, 4, 4, 2), Mamba2(8, 4, 4, 2, 8), Hydra(8, 4, 7, 2, 8)])
def test_models_copy_and_pickle(mixer):
    u = torch.randn(2, 9, 8)
    y = mixer(u)[0]
    y.sum().backward()
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert torch.equal(twin(u)[0], y)


class Outputs(torch.utils.data.Dataset):
    """Runs every op where it is read: in a DataLoader's worker."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.manual_seed(index)
        calls = [(op, *arguments(op, 2, 70, 2, torch.float32)) for op in OPS]
        outs = [op(*tensors, **keywords) for op, tensors, keywords in calls]
        return torch.cat([(out[0] if isinstance(out, tuple) else out).flatten() for out in outs])


def test_works_in_forked_workers():
    torch.set_num_threads(2)
    here = [Outputs()[i] for i in range(4)]  # threads have run before the fork
    torch.set_num_threads(1)
    loader = DataLoader(Outputs(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for found, expected in zip(loader, here):
        assert torch.equal(found, expected)


def test_a_forked_process_starts_threads_of_its_own(monkeypatch):
    """The threads of OpenMP do not live in it, and whoever waits for them waits for ever."""
    monkeypatch.setattr(native, "GRAIN", 1e-9)
    torch.set_num_threads(2)
    try:
        tensors, keywords = arguments(ops.ssd, 4, 70, 4, torch.float32)
        with ops.use_backend("native"):
            here = ops.ssd(*tensors, **keywords)[0]

            def work():
                os._exit(0 if torch.equal(ops.ssd(*tensors, **keywords)[0], here) else 1)

            process = multiprocessing.get_context("fork").Process(target=work)
            process.start()
            process.join(30)
            process.kill()
    finally:
        torch.set_num_threads(1)
    assert process.exitcode == 0


RUNS_WITHOUT = """
import torch
from recbole_ssm import doctor, ops
assert ops.available_backends() == ["reference", "torch"], ops.available_backends()
y, _ = ops.causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 4))
assert y[0, :, 0].tolist() == [1, 2, 3]
print(doctor.report())
"""


def python(code, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": str(cwd), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("damage", ["absent", "garbage", "other sources", "no such instruction set"])
def test_without_the_library_torch_takes_over(tmp_path, damage):
    for folder in ("recbole_ssm", "properties"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    library, environment = tmp_path / "recbole_ssm" / "_native.so", {}
    if damage == "garbage":
        library.write_bytes(b"not a library")
    elif damage != "absent":
        shutil.copy(native.LIBRARY, library)
    if damage == "other sources":
        with open(tmp_path / "recbole_ssm" / "csrc" / "simd.h", "a") as source:
            source.write("// A change after the library was built.\n")
    elif damage == "no such instruction set":
        environment = {"RECBOLE_SSM_ISA": "avx9"}
    result = python(RUNS_WITHOUT, tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    words = {"absent": "not built", "garbage": "cannot be loaded", "other sources": "built from other sources"}
    assert words.get(damage, "no instruction set 'avx9'") in result.stdout
    assert (damage == "absent") != ("native kernels:" in result.stderr)


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """The tests of the ops again, on a build with AddressSanitizer and UndefinedBehaviorSanitizer."""
    repository = tmp_path / "repository"
    shutil.copytree(REPOSITORY, repository, ignore=shutil.ignore_patterns("*.so", "__pycache__", ".git", "build"))
    conftest = repository / "tests" / "conftest.py"
    conftest.write_text(
        conftest.read_text().replace("max_examples=25", "max_examples=6")
    )  # each takes ten times as long
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "CFLAGS": flags, "LDFLAGS": flags, "PYTHONPATH": str(repository)}
    subprocess.run(build, cwd=repository, env=environment, check=True, capture_output=True)
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment |= {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    tests = [sys.executable, "-m", "pytest", "tests/ops", "tests/layers/test_step.py", "-q"]
    tests.append("tests/layers/test_history.py")
    result = subprocess.run(tests, cwd=repository, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = python("from recbole_ssm.ops import native; print(native.unusable)", repository, **{
        key: environment[key] for key in ("LD_PRELOAD", "ASAN_OPTIONS")
    })  # fmt: skip
    assert found.stdout.strip() == "", found.stdout + found.stderr
