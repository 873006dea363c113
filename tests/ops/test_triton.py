"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter, which runs them on the CPU.

The interpreter must be chosen before Triton is imported, so a process of its own runs these tests once more with it.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from recbole_ssm import ops
from recbole_ssm.ops.packing import cu_seqlens_of
from recbole_ssm.ops.triton import INTERPRETED, unusable
from tests.conftest import REPOSITORY
from tests.ops.test_ops import OPS, arguments, assert_close, each_op, values_and_gradients

DEVICE = "cpu" if INTERPRETED else "cuda"
SCANS = [op for op in OPS if "conv" not in op.__name__]
on_kernels = pytest.mark.skipif(bool(unusable()), reason=f"{unusable()}; test_in_the_interpreter runs it on the CPU")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def python(*arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(INTERPRETED or importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter(tmp_path):
    found = python(
        "-m", "pytest", "-p", "no:cacheprovider", "tests/ops/test_triton.py", "tests/ops/test_triton_tiles.py",
        "tests/ops/test_pieces.py",
        TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-4000:]
    assert "passed" in found.stdout


def at_device(op):
    """The op on the kernels' device, from tensors of the CPU to tensors of the CPU."""

    def call(*tensors, **keywords):
        keywords = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in keywords.items()}
        out = op(*[t.to(DEVICE) for t in tensors], **keywords)
        return tuple(None if o is None else o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()

    return call


def assert_equals_reference(op, tensors, keywords, cu_seqlens=None, tolerance=1e-5, dtype=torch.float32):
    expected = values_and_gradients(op, "reference", tensors, keywords, torch.float64, cu_seqlens)
    found = values_and_gradients(at_device(op), "cuda", tensors, keywords, dtype, cu_seqlens)
    for f, e in zip(found, expected):
        assert_close(f, e, tolerance * (1 if e.numel() > 1 else 10))  # a sum of all tokens may cancel


@on_kernels
@each_op
@pytest.mark.parametrize("lengths", [[3, 0, 1, 33, 0], [1, 2, 1]])
def test_packed_equals_reference(op, lengths):
    torch.manual_seed(0)
    cu_seqlens = cu_seqlens_of(torch.tensor(lengths))
    tensors, keywords = arguments(op, 1, sum(lengths), len(lengths))
    assert_equals_reference(op, tensors, keywords, cu_seqlens)


@on_kernels
@each_op
@pytest.mark.parametrize("L", [1, 37])
def test_padded_equals_reference(op, L):
    """With shares of the channels on several programs, and rows that are parts of wider ones."""
    torch.manual_seed(0)
    tensors, keywords = arguments(op, 2, L, 2, sizes=(34, 3, 2, 5, 1, 3))
    wider = [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in tensors]
    assert_equals_reference(op, wider, keywords)


@on_kernels
@each_op
def test_what_may_be_left_out(op):
    torch.manual_seed(0)
    tensors, _ = arguments(op, 2, 5, 2)
    if op in (ops.selective_scan, ops.selective_scan_last, ops.ssd, ops.ssd_last):
        tensors = [tensors[0], tensors[1].abs(), *tensors[2:5]]
    elif op is not ops.quasiseparable:
        tensors = tensors[:2]
    assert_equals_reference(op, tensors, {})


@on_kernels
def test_ssd_without_its_final_state():
    torch.manual_seed(0)
    tensors, _ = arguments(ops.ssd, 2, 35, 2)
    with ops.use_backend("cuda"):
        y, state = at_device(ops.ssd)(*[t.float() for t in tensors], dt_softplus=True, return_state=False)
    assert state is None
    assert_close(y, ops.ssd(*tensors, dt_softplus=True)[0], 1e-5)


@on_kernels
@pytest.mark.parametrize("op", SCANS, ids=lambda op: op.__name__)
def test_extreme_steps_stay_finite(op):
    torch.manual_seed(0)
    tensors, keywords = arguments(op, 1, 18, 1, torch.float32)
    for index in (1, 2) if op is ops.quasiseparable else (1,):
        tensors[index] = tensors[index].abs() * 1e4
    for out in values_and_gradients(at_device(op), "cuda", tensors, keywords, torch.float32, None):
        assert torch.isfinite(out).all()


@on_kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_no_earlier_position_in_ssd(value):
    torch.manual_seed(0)
    tensors, keywords = arguments(ops.ssd, 1, 37, 1, torch.float32)
    with ops.use_backend("cuda"):
        expected = at_device(ops.ssd)(*tensors, **keywords)[0]
        for index in (0, 1, 3, 4):
            worse = [tensor.clone() for tensor in tensors]
            worse[index][0, 21] = value
            found = at_device(ops.ssd)(*worse, **keywords)[0]
            assert torch.equal(found[:, :21], expected[:, :21]) and not torch.isfinite(found[:, 21:]).all()


@on_kernels
@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(op, dtype):
    """What is computed in float32 and rounded at its end alone: within two units of the last place."""
    torch.manual_seed(0)
    tensors, keywords = arguments(op, 1, 9, 1)
    tensors = [t.to(dtype).double() for t in tensors]
    keywords = {k: v.to(dtype).double() if torch.is_tensor(v) else v for k, v in keywords.items()}
    assert_equals_reference(op, tensors, keywords, tolerance=2 * torch.finfo(dtype).eps, dtype=dtype)
    with ops.use_backend("cuda"):
        out = at_device(op)(*[t.to(dtype) for t in tensors])
    y, state = out if isinstance(out, tuple) else (out, None)
    assert y.dtype == dtype
    assert state is None or state.dtype == (dtype if "conv" in op.__name__ else torch.float32)


@on_kernels
@each_op
def test_torch_sees_through_the_operators(op):
    """Fake kernels, autograd registration and compilation without a graph break."""
    tensors, keywords = arguments(op, 1, 3, 1, torch.float32)
    tensors = [t.to(DEVICE).requires_grad_() for t in tensors]
    keywords = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in keywords.items()}

    def loss(*tensors):
        out = op(*tensors, **keywords)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    with ops.use_backend("cuda"):
        expected = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            expected[0].sum().backward()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for f, e in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
            torch.testing.assert_close(f, e)


@on_kernels
def test_what_no_kernel_takes_is_computed_by_torch():
    tensors, keywords = arguments(ops.ssd, 1, 5, 1)
    with ops.use_backend("cuda"):
        assert at_device(ops.ssd)(*tensors, **keywords)[0].dtype == torch.float64
        x, weight = torch.randn(1, 40, 2), torch.randn(2, 33)
        assert_close(at_device(ops.causal_conv1d)(x, weight)[0], ops.causal_conv1d(x, weight)[0], 1e-5)


@on_kernels
@pytest.mark.parametrize("bounds", [[0, 4, 3, 6], [0, 70], [-5, 6], [2, 3, 90]])
def test_wrong_bounds_do_not_reach_beyond_the_batch(bounds):
    """Past the public functions, which refuse them on the CPU."""
    x, dt, A, B, C, *_ = (t.to(DEVICE) for t in arguments(ops.selective_scan, 1, 6, 1, torch.float32)[0])
    bounds = torch.tensor(bounds, device=DEVICE)
    torch.ops.recbole_ssm_cuda.selective_scan(x, dt, A, B, C, None, None, None, None, bounds, True, False)
    torch.ops.recbole_ssm_cuda.causal_conv1d(x, torch.ones(6, 4, device=DEVICE), None, None, bounds, "silu")


def test_a_program_exported_without_gradients_refuses_a_backward():
    x, dt, A, B, C, *_ = arguments(ops.selective_scan, 1, 20, 1, torch.float32)[0]
    backward = torch.ops.recbole_ssm_cuda.selective_scan_backward
    with pytest.raises(ValueError, match="kept no states for a backward"):
        backward(x, None, x.new_empty(0, 5, 6), x, dt, A, B, C, None, None, None, None, None, True)


def test_operators_refuse_what_does_not_fit():
    x, weight, bias = arguments(ops.causal_conv1d, 2, 6, 2, torch.float32)[0]
    with pytest.raises(ValueError, match="bias must have shape"):
        torch.ops.recbole_ssm_cuda.causal_conv1d(x, weight, bias[:-1], None, None, "silu")
    for operator, rest in (
        (torch.ops.recbole_ssm_cuda.causal_conv1d, (None,)),
        (torch.ops.recbole_ssm_cuda.centered_conv1d, ()),
    ):
        with pytest.raises(ValueError, match="conv1d: no kernel for 17 taps"):
            operator(x, weight.repeat(1, 5)[:, :17], bias, *rest, None, "silu")


@pytest.mark.skipif(INTERPRETED, reason="no matter of the kernels")
def test_triton_is_imported_for_kernels_alone():
    code = "import sys, recbole_ssm.ops, recbole_ssm.layers; assert 'triton' not in sys.modules"
    found = python("-c", code)
    assert found.returncode == 0, found.stderr


@on_a_gpu
@each_op
def test_sizes_of_this_field_on_a_gpu(op):
    torch.manual_seed(0)
    lengths = torch.randint(1, 200, (300,))
    tensors, keywords = arguments(op, 1, int(lengths.sum()), 300, sizes=(128, 32, 2, 64, 1, 4))
    expected = values_and_gradients(op, "torch", tensors, keywords, torch.float64, cu_seqlens_of(lengths))
    cu_seqlens = cu_seqlens_of(lengths).to(DEVICE)
    found = values_and_gradients(at_device(op), "cuda", tensors, keywords, torch.float32, cu_seqlens)
    for f, e in zip(found, expected):
        assert_close(f, e, 3e-5)


@on_kernels
@pytest.mark.parametrize(("n", "d", "V"), [(1, 3, 1), (70, 20, 130), (130, 64, 65)])
@pytest.mark.parametrize("form", ["plain", "bias and smoothing", "mask and weights", "sampled"])
def test_loss_equals_reference(n, d, V, form):
    torch.manual_seed(0)
    output, items, target = torch.randn(n, d), torch.randn(V, d), torch.randint(0, V, (n,))
    keywords = {
        "plain": {},
        "bias and smoothing": {"bias_V": torch.randn(V), "label_smoothing": 0.1, "temperature": 0.5},
        "mask and weights": {
            "mask_V": (torch.rand(V) < 0.7).index_fill(0, target, True), "weight_n": torch.rand(n),
            "label_smoothing": 0.1,
        },
        "sampled": {"candidates_K": torch.randint(0, V, (50,)), "bias_V": torch.randn(V)},
    }[form]  # fmt: skip

    def evaluate(backend, device, dtype):
        given = [t.to(device, dtype).requires_grad_() for t in (output, items)]
        numbers = {k: v.to(device, dtype if v.is_floating_point() else None) if torch.is_tensor(v) else v
                   for k, v in keywords.items()}  # fmt: skip
        with ops.use_backend(backend):
            loss = ops.linear_cross_entropy(*given, target.to(device), **numbers)
        return [t.detach().cpu() for t in (loss, *torch.autograd.grad(3 * loss, given))]

    expected = evaluate("reference", "cpu", torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        for found, e in zip(evaluate("cuda", DEVICE, dtype), expected):
            # where one item is all there is, gradients are nothing but rounding
            assert ((found.double() - e).abs() <= tolerance * e.abs().max().clamp(min=0.1)).all()
