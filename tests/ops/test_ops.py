"""Invariants 1, 2 and 4: every backend equals the float64 reference, values and gradients, in every form of a call."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm import ops
from recbole_ssm.ops.backend import available_backends
from recbole_ssm.ops.packing import buckets, cu_seqlens_of, last_of, segment_sum_after

SIZES = D, N, H, P, G, K = 6, 5, 4, 3, 2, 4


def arguments(op, batch, L, S, dtype=torch.float64, sizes=SIZES):
    """Random tensors for an op: positional ones and keyword ones. S states or last positions."""
    D, N, H, P, G, K = sizes

    def r(*shape):
        return torch.randn(*shape, dtype=dtype)

    def decay(*shape):
        return -torch.rand(*shape, dtype=dtype) * 4

    raw_step = {"dt_softplus": True}
    if op is ops.selective_scan:
        tensors = [r(batch, L, D), r(batch, L, D), decay(D, N), r(batch, L, N), r(batch, L, N), r(D), r(batch, L, D)]
        return tensors, {"dt_bias": r(D), "state_BDN": r(S, D, N), **raw_step}
    if op is ops.selective_scan_last:
        tensors = [r(batch, L, D), r(batch, L, D), decay(D, N), r(batch, L, N), r(S, N), r(D), r(S, D)]
        return tensors, {"dt_bias": r(D), **raw_step}
    if op is ops.ssd:
        tensors = [r(batch, L, H, P), r(batch, L, H), decay(H), r(batch, L, G, N), r(batch, L, G, N), r(H)]
        return tensors, {"dt_bias": r(H), "state_BHPN": r(S, H, P, N), **raw_step}
    if op is ops.ssd_last:
        tensors = [r(batch, L, H, P), r(batch, L, H), decay(H), r(batch, L, G, N), r(S, G, N), r(H)]
        return tensors, {"dt_bias": r(H), **raw_step}
    if op is ops.quasiseparable:
        steps = [F.softplus(r(batch, L, H)), F.softplus(r(batch, L, H))]
        return [r(batch, L, H, P), *steps, decay(H), *[r(batch, L, G, N) for _ in range(4)]], {}
    if op is ops.causal_conv1d:
        return [r(batch, L, D), r(D, K), r(D)], {"activation": "silu", "state_BDK": r(S, D, K)}
    return [r(batch, L, D), r(D, K + 1 - K % 2), r(D)], {"activation": "silu"}


OPS = [
    ops.selective_scan,
    ops.selective_scan_last,
    ops.ssd,
    ops.ssd_last,
    ops.quasiseparable,
    ops.causal_conv1d,
    ops.centered_conv1d,
]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
each_backend = pytest.mark.parametrize("backend", [b for b in available_backends() if b != "reference"])


def values_and_gradients(op, backend, tensors, keywords, dtype, cu_seqlens):
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    keywords = {k: v.to(dtype).requires_grad_() if torch.is_tensor(v) else v for k, v in keywords.items()}
    with ops.use_backend(backend):
        out = op(*tensors, **keywords, cu_seqlens=cu_seqlens)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    loss = sum((o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outs)
    inputs = tensors + [v for v in keywords.values() if torch.is_tensor(v)]
    return [*[o.detach() for o in outs], *torch.autograd.grad(loss, inputs)]


def assert_close(found, expected, tolerance):
    """Relative to the largest entry."""
    assert torch.isfinite(found).all()
    scale = expected.abs().max().clamp(min=1e-6) if expected.numel() else 1.0
    assert ((found.double() - expected.double()).abs() <= tolerance * scale).all()


@each_backend
@each_op
@given(data=st.data())
def test_backend_equals_reference(op, backend, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    if data.draw(st.booleans(), label="packed"):
        lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any))
        cu_seqlens = cu_seqlens_of(torch.tensor(lengths))
        tensors, keywords = arguments(op, 1, sum(lengths), len(lengths))
    else:
        batch, L = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 7, 50, 161, 300]))
        cu_seqlens = None
        tensors, keywords = arguments(op, batch, L, batch)
    expected = values_and_gradients(op, "reference", tensors, keywords, torch.float64, cu_seqlens)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        found = values_and_gradients(op, backend, tensors, keywords, dtype, cu_seqlens)
        for f, e in zip(found, expected):
            assert_close(f, e, tolerance)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("op", [ops.selective_scan, ops.ssd, ops.causal_conv1d], ids=lambda op: op.__name__)
@given(data=st.data())
def test_cut_anywhere_with_carried_state(op, backend, data):
    """Chunk by chunk, with the state carried, equals the whole; chunks of one position are step by step."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    L = data.draw(st.integers(2, 20))
    cuts = sorted(data.draw(st.sets(st.integers(1, L - 1), max_size=4)))
    if data.draw(st.booleans(), label="step by step"):
        cuts = list(range(1, L))
    tensors, keywords = arguments(op, 2, L, 2)
    state_name = next(name for name in keywords if name.startswith("state"))
    with ops.use_backend(backend):
        whole, whole_state = op(*tensors, **keywords)
        state, ys = keywords[state_name], []
        for begin, end in zip([0, *cuts], [*cuts, L]):
            piece = [t[:, begin:end] if t.dim() > 2 else t for t in tensors]
            y, state = op(*piece, **{**keywords, state_name: state})
            ys.append(y)
    assert_close(torch.cat(ys, 1), whole, 1e-9)
    assert_close(state, whole_state, 1e-9)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("length", [0, 40, 170])
@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_ssd_without_its_final_state(backend, length, carried, packed):
    """The same y and gradients, to the bit, and None."""
    (x, *rest), keywords = arguments(
        ops.ssd, 1 if packed else 2, 2 * length + 5 if packed else length, 2, torch.float32
    )
    tensors = [t.requires_grad_() for t in (x, *rest)]
    if not carried:
        del keywords["state_BHPN"]
    if packed:
        keywords["cu_seqlens"] = torch.tensor([0, length, 2 * length + 5])
    results = []
    with ops.use_backend(backend):
        for return_state in (True, False):
            y, state = ops.ssd(*tensors, **keywords, return_state=return_state)
            assert (state is None) != return_state
            results.append((y, *torch.autograd.grad(y.square().sum(), tensors, materialize_grads=True)))
    for one, other in zip(*results):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", available_backends())
@each_op
def test_packed_equals_each_sequence_alone(op, backend):
    torch.manual_seed(0)
    lengths = [3, 1, 17, 9, 40]
    cu_seqlens = cu_seqlens_of(torch.tensor(lengths))
    total = sum(lengths)
    tensors, keywords = arguments(op, 1, total, len(lengths))
    with ops.use_backend(backend):
        packed = op(*tensors, **keywords, cu_seqlens=cu_seqlens)
        packed = packed if isinstance(packed, tuple) else (packed,)
        for s, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])):

            def alone(t, s=s, begin=begin, end=end):
                if not torch.is_tensor(t) or t.dim() < 2:
                    return t
                if t.shape[:2] == (1, total):
                    return t[:, begin:end]
                return t[s : s + 1] if t.shape[0] == len(lengths) else t

            single = op(*map(alone, tensors), **{k: alone(v) for k, v in keywords.items()})
            single = single if isinstance(single, tuple) else (single,)
            for p, one in zip(packed, single):
                assert_close(p[:, begin:end] if p.shape[:2] == (1, total) else p[s : s + 1], one, 1e-9)


@each_op
def test_neighbours_leave_no_trace(op):
    """Invariant 2: what stands beside a sequence in a packed batch does not change one bit of its result."""
    torch.manual_seed(0)
    lengths = [5, 8, 4]
    cu_seqlens = cu_seqlens_of(torch.tensor(lengths))
    tensors, keywords = arguments(op, 1, sum(lengths), 3)
    other = [torch.cat([t[:, :5] + 1, t[:, 5:13], t[:, 13:] - 1], 1) if t.shape[:2] == (1, 17) else t for t in tensors]
    for first, second in zip(*[op(*t, **keywords, cu_seqlens=cu_seqlens) for t in (tensors, other)]):
        if first.shape[0] == 17:
            assert torch.equal(first[5:13], second[5:13])
        elif first.shape[0] == 3:
            assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("L", [9, 200])
def test_quasiseparable_ignores_padding(backend, L):
    torch.manual_seed(0)
    lengths = torch.tensor([L, 4, 1, 0])
    tensors, _ = arguments(ops.quasiseparable, 4, L, 4)
    changed = [
        t
        if t.shape[:2] != (4, L)
        else torch.where((torch.arange(L) < lengths[:, None]).view(4, L, *[1] * (t.dim() - 2)), t, 9.0)
        for t in tensors
    ]
    with ops.use_backend(backend):
        y, y_changed = (ops.quasiseparable(*t, lengths_B=lengths) for t in (tensors, changed))
    assert torch.equal(y, y_changed)
    assert not y[1, 4:].any() and not y[3].any()


def test_quasiseparable_is_shift_flip_shift():
    """Equation of Hydra's section 3.2, spelled out with ssd."""
    torch.manual_seed(0)
    (x, dt_f, dt_b, A, B_f, C_f, B_b, C_b), _ = arguments(ops.quasiseparable, 2, 11, 2)

    def shift(y):
        return torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)

    forward = shift(ops.ssd(x, dt_f, A, B_f, C_f)[0])
    backward = shift(ops.ssd(x.flip(1), dt_b.flip(1), A, B_b.flip(1), C_b.flip(1))[0]).flip(1)
    assert_close(ops.quasiseparable(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b), forward + backward, 1e-9)


@each_backend
@each_op
def test_extreme_steps_stay_finite(op, backend):
    """A decay underflows to 0 and never overflows."""
    if "conv" in op.__name__:
        pytest.skip("a convolution has no step size")
    torch.manual_seed(0)
    tensors, keywords = arguments(op, 2, 60, 2, torch.float32)
    for index in (1, 2) if op is ops.quasiseparable else (1,):
        tensors[index] = tensors[index].abs() * 1e4
    for out in values_and_gradients(op, backend, tensors, keywords, torch.float32, None):
        assert torch.isfinite(out).all()


@each_op
def test_half_precision_comes_back_as_it_went_in(op):
    tensors, keywords = arguments(op, 2, 5, 2, torch.bfloat16)
    if "conv" in op.__name__:
        keywords["activation"] = None
    out = op(*tensors, **keywords)
    y, state = out if isinstance(out, tuple) else (out, None)
    assert y.dtype == torch.bfloat16
    assert state is None or state.dtype == (torch.bfloat16 if "conv" in op.__name__ else torch.float32)


@pytest.mark.parametrize("L", [5, 320])
@each_op
def test_strides_do_not_count(op, L):
    torch.manual_seed(0)
    tensors, keywords = arguments(op, 2, L, 2)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    found, expected = op(*strided, **keywords), op(*tensors, **keywords)
    for f, e in zip(found, expected) if isinstance(found, tuple) else [(found, expected)]:
        assert_close(f, e, 1e-12)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("op", [ops.selective_scan, ops.ssd, ops.causal_conv1d], ids=lambda op: op.__name__)
def test_nothing_in_leaves_the_state_as_it_was(op, backend):
    tensors, keywords = arguments(op, 2, 0, 2)
    state = next(value for name, value in keywords.items() if name.startswith("state"))
    with ops.use_backend(backend):
        y, after = op(*tensors, **keywords)
    assert y.shape == tensors[0].shape
    assert torch.equal(after, state)


@each_op
def test_gradcheck(op):
    torch.manual_seed(0)
    tensors, keywords = arguments(op, 2, 4, 2)
    names = [k for k, v in keywords.items() if torch.is_tensor(v)]
    inputs = [t.requires_grad_() for t in (*tensors, *[keywords[k] for k in names])]

    def call(*values):
        return op(*values[: len(tensors)], **{**keywords, **dict(zip(names, values[len(tensors) :]))})

    with ops.use_backend("torch"):
        assert torch.autograd.gradcheck(call, inputs)


@each_op
def test_torch_compiles_the_torch_form(op):
    """Also where the gradients are to be differentiated again: gradients are those of eager mode."""
    tensors, keywords = arguments(op, 2, 6, 2, torch.float32)
    tensors = [t.requires_grad_() for t in tensors]

    def loss(*tensors):
        out = op(*tensors, **keywords)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    with ops.use_backend("torch"):
        expected = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for f, e in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
            torch.testing.assert_close(f, e)


def test_reference_of_mamba_ssm():
    """Ours against upstream's own plain functions, where that package can be imported."""
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("mamba-ssm is not installed")
    try:
        from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    except Exception as error:  # without a GPU its own imports fail in many ways
        pytest.skip(f"mamba-ssm cannot be imported here: {error}")
    torch.manual_seed(0)
    (x, dt, A, B, C, skip, z), keywords = arguments(ops.selective_scan, 2, 8, 2, torch.float32)
    ours, _ = ops.selective_scan(x, dt, A, B, C, skip, z, dt_bias=keywords["dt_bias"], dt_softplus=True)
    t = [v.transpose(1, 2) for v in (x, dt, B, C, z)]
    theirs = selective_scan_ref(t[0], t[1], A, t[2], t[3], skip, t[4], keywords["dt_bias"], True).transpose(1, 2)
    assert_close(ours, theirs, 1e-5)
    (x, dt, A, B, C, _), _ = arguments(ops.ssd, 2, 8, 2)
    dt, B, C = F.softplus(dt), B[:, :, :1].expand(-1, -1, H, -1), C[:, :, :1].expand(-1, -1, H, -1)
    theirs, _ = ssd_minimal_discrete(x * dt[..., None], A * dt, B, C, 4)
    assert_close(ops.ssd(x, dt, A, B[:, :, :1], C[:, :, :1])[0], theirs, 1e-9)


# --- packing ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 200), min_size=1, max_size=40).filter(any))
def test_buckets_hold_every_token_once(lengths):
    cu_seqlens = cu_seqlens_of(torch.tensor(lengths))
    found = buckets(cu_seqlens)
    tokens = torch.cat([bucket.index_bl[bucket.mask_bl] for bucket in found])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    cells = sum(bucket.mask_bl.numel() for bucket in found)
    assert cells <= max(2 * sum(lengths), 8 * len(lengths))


def test_segment_sum_after_keeps_the_digits_of_a_long_batch():
    values = torch.full((400_000, 1), 0.1)
    values[-2:] = torch.tensor([[1e-3], [2e-3]])
    cu_seqlens = torch.tensor([0, 399_998, 400_000])
    assert segment_sum_after(values, cu_seqlens)[-2].item() == pytest.approx(2e-3, rel=1e-6)


def test_last_of_an_empty_sequence_is_zero():
    x = torch.arange(1.0, 4.0).view(1, 3, 1)
    assert last_of(x, torch.tensor([0, 0, 2, 2, 3])).flatten().tolist() == [0, 2, 0, 3]


# --- bad calls ----------------------------------------------------------------------------------------------------


@each_op
def test_wrong_shapes_are_named(op):
    tensors, keywords = arguments(op, 2, 5, 2)
    with pytest.raises(ValueError, match=rf"^{op.__name__}: .* must .*\[") as caught:
        op(tensors[0], tensors[1][:-1], *tensors[2:], **keywords)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 3, 5], [5], [0, 5, 6]])
@each_op
def test_wrong_bounds_are_refused(op, bounds):
    tensors, keywords = arguments(op, 1, 5, max(len(bounds) - 1, 1))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the total length 5"):
        op(*tensors, **keywords, cu_seqlens=torch.tensor(bounds))


def test_unknown_or_absent_backend_is_named():
    from recbole_ssm.errors import UserError

    with pytest.raises(UserError, match="'torhc' is not one of .*did you mean 'torch'"):
        ops.set_backend("torhc")
    if "cuda" not in available_backends():
        with pytest.raises(
            UserError, match="'cuda' is not installed on this machine.*; use one of auto, reference, torch"
        ):
            ops.set_backend("cuda")
