"""Long sequences in pieces that a GPU walks along at once; short ones here, cut into shorter pieces.

The interpreter runs the kernels where there is no GPU: see test_triton.py.
"""

import pytest
import torch

from recbole_ssm import ops
from recbole_ssm.ops import numerics, selftest
from recbole_ssm.ops.packing import cu_seqlens_of
from recbole_ssm.ops.triton import last, operators, pieces
from tests.ops.test_ops import arguments, assert_close, values_and_gradients
from tests.ops.test_triton import DEVICE, assert_equals_reference, at_device, on_kernels

CUT = [ops.selective_scan, ops.selective_scan_last, ops.ssd, ops.quasiseparable]
SIZES = (6, 5, 2, 3, 1, 4)
PIECE = 4
LENGTHS = [0, 1, PIECE - 1, 0, PIECE, PIECE + 1, 2 * PIECE, 0]
each_cut_op = pytest.mark.parametrize("op", CUT, ids=lambda op: op.__name__)


def cut_all(monkeypatch, piece=PIECE):
    """Let pieces of so many positions be cut from whatever comes."""
    monkeypatch.setattr(pieces, "PIECE", piece)
    monkeypatch.setattr(pieces, "worthwhile", lambda *sizes: True)


def test_ops_that_are_cut():
    assert {op.__name__ for op in CUT} == set(selftest.LONG) == set(operators.WALKS) | {"selective_scan_last"}


@on_kernels
@each_cut_op
def test_packed_pieces_equal_the_reference_and_the_walk(op, monkeypatch):
    torch.manual_seed(0)
    cu_seqlens = cu_seqlens_of(torch.tensor(LENGTHS))
    tensors, keywords = arguments(op, 1, sum(LENGTHS), len(LENGTHS), sizes=SIZES)
    walked = values_and_gradients(at_device(op), "cuda", tensors, keywords, torch.float32, cu_seqlens)
    cut_all(monkeypatch)
    expected = values_and_gradients(op, "reference", tensors, keywords, torch.float64, cu_seqlens)
    found = values_and_gradients(at_device(op), "cuda", tensors, keywords, torch.float32, cu_seqlens)
    for f, w, e in zip(found, walked, expected):
        assert_close(f, e, 1e-5)
        assert_close(f, w, 1e-5)
    # sums in another order: they were cut
    assert any(not torch.equal(f, w) for f, w in zip(found, walked))


@on_kernels
@each_cut_op
def test_padded_pieces_without_what_may_be_left_out(op, monkeypatch):
    """Of rows that are parts of wider ones; a piece is more than a chunk of a kernel, and no multiple of one."""
    torch.manual_seed(0)
    cut_all(monkeypatch, 20)
    tensors, _ = arguments(op, 2, 35, 2, sizes=SIZES)
    if op is not ops.quasiseparable:
        tensors = [tensors[0], tensors[1].abs(), *tensors[2:5]]
    assert_equals_reference(op, [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in tensors], {})


@on_kernels
@each_cut_op
def test_half_pieces(op, monkeypatch):
    torch.manual_seed(0)
    cut_all(monkeypatch)
    tensors, keywords = arguments(op, 1, 9, 1, sizes=SIZES)
    tensors = [t.bfloat16().double() for t in tensors]
    keywords = {k: v.bfloat16().double() if torch.is_tensor(v) else v for k, v in keywords.items()}
    assert_equals_reference(op, tensors, keywords, tolerance=2 * 2**-7, dtype=torch.bfloat16)


@on_kernels
def test_the_other_operators_walk(monkeypatch):
    """Forward and backward: those that take over where pieces fail the self-test."""
    cut_all(monkeypatch)
    monkeypatch.setattr(pieces, "cut", None)
    tensors, _ = arguments(ops.ssd, 1, 9, 1, sizes=SIZES)
    x, *rest = (t.float().to(DEVICE) for t in tensors)
    y, _ = operators.WALKS["ssd"](x.requires_grad_(), *rest, None, None, True)
    y.sum().backward()
    with pytest.raises(TypeError, match="not callable"):
        operators.OPERATORS["ssd"](x, *rest, None, None, True)


@on_kernels
@pytest.mark.parametrize("bounds", [[0, 9, 3, 6], [0, 70], [-5, 6], [2, 3, 90]])
def test_wrong_bounds_do_not_reach_beyond_the_batch(bounds, monkeypatch):
    cut_all(monkeypatch)
    x, dt, A, B, C, *_ = (t.to(DEVICE) for t in arguments(ops.selective_scan, 1, 9, 1, torch.float32)[0])
    bounds = torch.tensor(bounds, device=DEVICE)
    torch.ops.recbole_ssm_cuda.selective_scan(x, dt, A, B, C, None, None, None, None, bounds, True, False)
    last.selective_scan_last(
        x, dt, A, B, C[0, : len(bounds) - 1], torch.ones(6, device=DEVICE), None, None, bounds, True
    )


@on_kernels
def test_compiled_code_does_not_ask_for_the_gpu(monkeypatch):
    def asked(x):
        raise AssertionError("which GPU it is")

    monkeypatch.setattr(last, "processors", asked)
    given = [t.to(DEVICE) for t in arguments(ops.selective_scan_last, 1, 9, 1, torch.float32)[0][:5]]
    given += [None] * 4 + [True]
    with pytest.raises(AssertionError, match="which GPU"):
        last.selective_scan_last(*given)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert last.selective_scan_last(*given).shape == given[0][:, 0].shape


@pytest.mark.parametrize("lengths", [[0], [5], [0, 4, 0, 1, 3, 8, 9, 0], [4, 4, 4], [1] * 9, [13, 0]])
def test_where_pieces_lie(lengths, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", PIECE)
    expected = []
    for s, (length, end) in enumerate(zip(lengths, cu_seqlens_of(torch.tensor(lengths))[1:].tolist())):
        expected += [(s, end - length + at, min(at + PIECE, length) - at) for at in range(0, length, PIECE)]
    found = pieces.cut(cu_seqlens_of(torch.tensor(lengths)), len(lengths), sum(lengths), sum(lengths), "cpu")
    bounds, of_piece = found["bounds"], found["of_piece"]
    assert len(bounds) == len(of_piece) == found["pieces"] + 1
    count = len(expected)
    assert list(zip(of_piece.tolist(), bounds.tolist(), bounds.diff().tolist()))[:count] == expected
    assert (bounds[count:] == sum(lengths)).all() and (of_piece[count:] == len(lengths)).all()
    assert found["first"].diff().tolist() == [-(-length // PIECE) for length in lengths]


@pytest.mark.parametrize("packed", [True, False])
def test_no_bound_is_read_by_the_cpu(packed):
    """What lies on the device ``meta`` has no values, and to read one is an error."""
    offsets = torch.empty(5, dtype=torch.int64, device="meta") if packed else None
    assert len(pieces.cut(offsets, 4, 2000, 8000, torch.device("meta"))["bounds"]) == 8000 // pieces.PIECE + 4 + 1


def test_few_long_sequences_are_cut():
    """The sizes of `bench gpu`, on an H200: 132 multiprocessors; a scan of 128 channels, SSD of 2 heads."""
    scan, ssd = 4, 16
    for warps in (scan, ssd):
        assert pieces.worthwhile(4, 64_000, warps, 132)
        assert not pieces.worthwhile(2048, 2048 * 50, warps, 132)
        assert not pieces.worthwhile(256, 256 * 200, warps, 132)
        assert not pieces.worthwhile(1, 200, warps, 132)
    assert pieces.worthwhile(64, 128_000, scan, 132) and not pieces.worthwhile(64, 128_000, ssd, 132)
    # the CPU, where the interpreter runs one program after another
    assert not pieces.worthwhile(1, 10**6, scan, 0)


@pytest.mark.parametrize("op", selftest.LONG)
def test_the_self_test_of_a_gpu_tries_pieces(op, monkeypatch):
    tried = []

    def compare(op, name, function, example, **keywords):
        tried.append(example)
        return selftest.Result(op, name, 0.0, 0.0, 0.0)

    monkeypatch.setattr(selftest, "_compare", compare)
    monkeypatch.setattr(selftest, "_example", lambda op, device, B, L: L)
    for device in ("cpu", "cuda"):
        assert selftest.why_wrong(op, None, torch.device(device)) == ""
    assert tried == [70, 70, selftest.LENGTH]
    # four heads of eight warps, on the smallest GPU
    assert pieces.worthwhile(1, selftest.LENGTH, 4 * 8, 14)


def test_tf32_where_pytorch_allows_it():
    matmul, half = torch.backends.cuda.matmul, torch.zeros(1, dtype=torch.float16)
    before = matmul.allow_tf32
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert operators._precision(half, torch.zeros(1)) == ("tf32" if allowed else "tf32x3")
            assert operators._precision(half, half) == "tf32"
            with numerics.without_tf32():
                assert operators._precision(torch.zeros(1)) == "tf32x3"
            assert matmul.allow_tf32 == allowed
    finally:
        matmul.allow_tf32 = before
