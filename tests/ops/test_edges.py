"""What every op does of calls without rows, of numbers that are not finite, and of types that do not fit."""

import pytest
import torch

from recbole_ssm import ops

BACKENDS = ops.available_backends()


def call(op, B=2, L=7, dtype=torch.float32, packed=None, **changed):
    """An op's outputs for random inputs of a shape; packed is the list of bounds of one row."""
    torch.manual_seed(0)
    B = B if packed is None else 1
    draw = {"dtype": dtype}
    x, A, D = torch.randn(B, L, 4, 8, **draw), -torch.rand(4, **draw), torch.randn(4, **draw)
    maps = [torch.randn(B, L, 2, 5, **draw) for _ in range(4)]
    given = {"x": x, "dt": torch.rand(B, L, 4, **draw), "A": A, "b": maps[0], "c": maps[1], "D": D} | changed
    bounds = {} if packed is None else {"cu_seqlens": torch.tensor(packed)}
    sequences = B if packed is None else len(packed) - 1
    x, dt, A, b, c, d = given.values()
    if op == "ssd":
        return ops.ssd(x, dt, A, b, c, d, **bounds)
    if op == "ssd_last":
        return ops.ssd_last(x, dt, A, b, torch.randn(sequences, 2, 5, **draw), d, **bounds)
    if op == "quasiseparable":
        return ops.quasiseparable(x, dt, dt, A, b, c, maps[2], maps[3], **bounds)
    x, dt, A = x.flatten(2), dt.repeat_interleave(8, 2), A.repeat_interleave(8)[:, None].expand(32, 5)
    if op == "selective_scan":
        return ops.selective_scan(x, dt, A, b[:, :, 0], c[:, :, 0], **bounds)
    if op == "selective_scan_last":
        return ops.selective_scan_last(x, dt, A, b[:, :, 0], torch.randn(sequences, 5, **draw), **bounds)
    weight = torch.randn(32, 3, **draw)
    return getattr(ops, op)(x, weight, None, activation="silu", **bounds)


SCANS = ["ssd", "ssd_last", "quasiseparable", "selective_scan", "selective_scan_last"]
CONVOLUTIONS = ["causal_conv1d", "centered_conv1d"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [*SCANS, *CONVOLUTIONS])
@pytest.mark.parametrize("shape", [{"B": 0}, {"L": 0, "packed": [0]}, {"L": 0, "packed": [0, 0, 0]}, {"B": 0, "L": 0}])
def test_a_batch_without_rows_gives_outputs_without_rows(backend, op, shape):
    with ops.use_backend(backend):
        found = call(op, **shape)
    y = found[0] if isinstance(found, tuple) else found
    sequences = shape.get("B", len(shape.get("packed", [0])) - 1)
    assert y.shape[0] == (sequences if op.endswith("_last") else 1 if "packed" in shape else shape["B"])
    assert not y.any() and y.dtype == torch.float32
    if isinstance(found, tuple):
        assert len(found[1]) == sequences


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("L", [9, 150])
@pytest.mark.parametrize("op", ["ssd", "selective_scan", "causal_conv1d"])
def test_what_is_not_finite_reaches_no_earlier_position(backend, value, L, op):
    t = 2 * L // 3
    for name in ("x", "dt", "b", "c")[: 1 if op == "causal_conv1d" else 4]:
        for packed in (None, [0, L]):
            shape = {"x": (2, L, 4, 8), "dt": (2, L, 4)}.get(name, (2, L, 2, 5))
            tensor = torch.rand(*shape)[: 1 if packed else 2]
            tensor[:, t] = value
            with ops.use_backend("reference"):
                expected = call(op, L=L, packed=packed, **{name: tensor})[0]
            with ops.use_backend(backend):
                found = call(op, L=L, packed=packed, **{name: tensor})[0]
            assert torch.isfinite(found[:, :t]).all(), name
            torch.testing.assert_close(found[:, :t], expected[:, :t], rtol=1e-4, atol=1e-4)
            assert torch.equal(found[:, t:].isfinite(), expected[:, t:].isfinite()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["x", "dt", "b", "c"])
@pytest.mark.parametrize("op", [*SCANS, *CONVOLUTIONS])
def test_what_is_not_finite_stays_in_its_sequence(backend, what, op):
    bounds, last = [0, 3, 5, 12], op.endswith("_last")
    torch.manual_seed(1)
    shapes = {"x": (1, 12, 4, 8), "dt": (1, 12, 4), "b": (1, 12, 2, 5), "c": (1, 12, 2, 5)}
    clean = torch.rand(shapes[what])
    spoiled = clean.index_fill(1, torch.arange(3), torch.nan)
    with ops.use_backend(backend):
        found, expected = (call(op, L=12, packed=bounds, **{what: t}) for t in (spoiled, clean))
    for f, e in zip(found, expected) if isinstance(found, tuple) else [(found, expected)]:
        # y has positions, or one vector a sequence, as states do.
        f, e = (t[0, 3:] if t.shape[:2] == (1, 12) and not last else t[1:] for t in (f, e))
        assert torch.equal(f, e)


@pytest.mark.parametrize("last_only", [True, False])
def test_attention_keeps_what_is_not_finite_in_its_sequence(last_only):
    torch.manual_seed(0)
    clean, bounds = torch.randn(3, 12, 2, 8), torch.tensor([0, 3, 5, 12])
    spoiled = clean.index_fill(1, torch.arange(3), torch.nan)
    found, expected = (
        ops.packed_attention(q[bounds[1:] - 1] if last_only else q, k, v, bounds, 7, last_only=last_only)
        for q, k, v in (spoiled, clean)
    )
    assert torch.equal(*(y[1 if last_only else 3 :] for y in (found, expected)))


def test_padding_that_is_not_finite_influences_nothing():
    """Of a padded batch."""
    torch.manual_seed(0)
    shapes = [(2, 7, 4, 8), (2, 7, 4), (2, 7, 4), *[(2, 7, 2, 5)] * 4]
    clean = [torch.rand(shape) for shape in shapes]
    spoiled = [t.clone() for t in clean]
    for t in spoiled:
        t[1, 4:] = torch.nan
    for backend in BACKENDS:
        with ops.use_backend(backend):
            found, expected = (
                ops.quasiseparable(*t[:3], -torch.ones(4), *t[3:], lengths_B=torch.tensor([7, 4]))
                for t in (spoiled, clean)
            )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [None, [0, 3, 7]])
def test_convolutions_give_the_type_of_their_input(backend, dtype, packed):
    bounds = None if packed is None else torch.tensor(packed)
    x, weight, bias = torch.randn(1, 7, 6, dtype=dtype), torch.randn(6, 3), torch.randn(6)
    for state in (None, torch.randn(1 if packed is None else 2, 6, 3)):
        with ops.use_backend(backend):
            y, after = ops.causal_conv1d(x, weight, bias, state_BDK=state, cu_seqlens=bounds, activation="silu")
            centered = ops.centered_conv1d(x, weight, bias, cu_seqlens=bounds, activation="silu")
        assert y.dtype == after.dtype == centered.dtype == dtype
        with ops.use_backend("reference"):
            right = ops.causal_conv1d(x.double(), weight, bias, state_BDK=state, cu_seqlens=bounds, activation="silu")[
                0
            ]
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
        torch.testing.assert_close(y.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_types_that_do_not_fit_are_errors(backend):
    A = -torch.rand(4, dtype=torch.complex64)
    outputs, items = torch.randn(3, 4), torch.randn(9, 4)
    with ops.use_backend(backend):
        for op in ("ssd", "ssd_last", "quasiseparable"):
            with pytest.raises(ValueError, match=f"{op}: A must hold floating-point numbers, got torch.complex64"):
                call(op, A=A)
        for target in (torch.ones(3), torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.complex64)):
            for op in (ops.linear_cross_entropy, ops.rank_targets):
                with pytest.raises(ValueError, match="target must hold whole numbers, got torch"):
                    op(outputs, items, target)


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_ranks_of_no_rows(backend):
    with ops.use_backend(backend):
        higher, ties = ops.rank_targets(torch.randn(0, 4), torch.randn(9, 4), torch.zeros(0, dtype=torch.int64))
        assert higher.shape == ties.shape == (0, 2)
        output = torch.randn(0, 4, requires_grad=True)
        loss = ops.linear_cross_entropy(output, torch.randn(9, 4), torch.zeros(0, dtype=torch.int64))
        assert loss.shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", SCANS)
def test_autocast_does_not_take_the_scans_in_half_precision(backend, op):
    def results():
        x = torch.randn(3, 7, 4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_("selective" in op)
        found = call(op, B=3, x=x, dt=dt)
        y, *rest = found if isinstance(found, tuple) else (found,)
        return [y, *rest, *(torch.autograd.grad(y.sum(), x) if x.requires_grad else ())]

    dt = torch.rand(3, 7, 4)
    with ops.use_backend(backend):
        expected = results()
        with torch.autocast("cpu", torch.bfloat16):
            found = results()
    for f, e in zip(found, expected):
        assert torch.equal(f, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_change_ranks(backend):
    torch.manual_seed(0)
    tensors = torch.randn(5, 16), torch.randn(900, 16), torch.arange(5)
    with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        found = ops.rank_targets(*tensors).ranks
    assert torch.equal(found, ops.rank_targets(*tensors).ranks)


def test_the_type_of_what_was_seen_may_be_a_narrow_one():
    """The numbers of all pairs of a row and an item go beyond it."""
    torch.manual_seed(0)
    tensors, seen = (torch.randn(300, 2), torch.randn(200, 2), torch.zeros(300).long()), torch.arange(1, 200)
    expected, found = (
        ops.rank_targets(*tensors, seen=(seen.to(t) + 100, seen.to(t))) for t in (torch.int64, torch.int16)
    )
    assert torch.equal(found.ranks, expected.ranks)
