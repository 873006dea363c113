"""The loss and the ranks over tiles: every backend against the float64 reference, in every form of a call."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm import ops
from recbole_ssm.ops import native
from recbole_ssm.ops.backend import available_backends, implementations
from tests.ops.test_native import MEMORY

loss_backends = pytest.mark.parametrize("backend", available_backends("linear_cross_entropy"))
needs_kernels = pytest.mark.skipif(bool(native.unusable), reason=f"native kernels: {native.unusable}")
rank_backends = pytest.mark.parametrize("backend", available_backends("rank_targets"))


def tensors(n, d, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(n, d, dtype=torch.float64, generator=generator)
    items = torch.randn(V, d, dtype=torch.float64, generator=generator)
    return output, items, torch.randint(0, V, (n,), generator=generator)


def a_call(data):
    """A call of any form: its tensors and keywords."""
    n = data.draw(st.sampled_from([0, 1, 2, 15, 16, 17, 33, 64, 130, 300]), label="n")
    d = data.draw(st.sampled_from([1, 3, 8, 16, 17, 33, 50]), label="d")
    V = data.draw(st.sampled_from([1, 2, 5, 31, 239, 240, 241, 500, 1025, 1300]), label="V")
    output, items, target = tensors(n, d, V, data.draw(st.integers(0, 1000)))
    keywords = {"temperature": data.draw(st.sampled_from([1.0, 0.3, 2.0]), label="temperature")}
    if data.draw(st.booleans(), label="weight"):
        keywords["weight_n"] = torch.rand(n, dtype=torch.float64)
    if data.draw(st.booleans(), label="bias"):
        keywords["bias_V"] = torch.randn(V, dtype=torch.float64)
    if data.draw(st.booleans(), label="mask"):
        keywords["mask_V"] = (torch.rand(V) < 0.7).index_fill(0, target, True)
    if data.draw(st.booleans(), label="sampled"):
        keywords["candidates_K"] = torch.randint(0, V, (data.draw(st.sampled_from([1, 7, 300]), label="K"),))
    else:
        keywords["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.1]), label="label smoothing")
    return output, items, target, keywords


def value_and_gradients(backend, output, items, target, keywords, dtype, with_gradient=(True, True)):
    given = [t.to(dtype).detach().requires_grad_(wanted) for t, wanted in zip((output, items), with_gradient)]
    keywords = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in keywords.items()}
    with ops.use_backend(backend):
        loss = ops.linear_cross_entropy(*given, target, **keywords)
    assert loss.shape == ()
    wanted = [t for t in given if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(3 * loss, wanted)] if wanted else [loss]


def close(found, expected, tolerance):
    """Gradients where little happens are rounding alone, so a difference counts from a hundredth on."""
    for f, e in zip(found, expected):
        assert torch.isfinite(f).all()
        scale = max(e.abs().max().item() if e.numel() else 0.0, 0.01)
        torch.testing.assert_close(f.double(), e, rtol=0, atol=tolerance * scale)


@loss_backends
@given(data=st.data())
def test_loss_equals_the_reference(backend, data):
    output, items, target, keywords = a_call(data)
    expected = value_and_gradients("reference", output, items, target, keywords, torch.float64)
    close(value_and_gradients(backend, output, items, target, keywords, torch.float64), expected, 1e-9)
    close(value_and_gradients(backend, output, items, target, keywords, torch.float32), expected, 3e-5)


@loss_backends
def test_reference_is_what_pytorch_says(backend):
    output, items, target = tensors(40, 6, 33)
    weight = torch.rand(40, dtype=torch.float64)
    each = F.cross_entropy(output @ items.T / 0.7, target, label_smoothing=0.2, reduction="none")
    with ops.use_backend(backend):
        found = ops.linear_cross_entropy(output, items, target, temperature=0.7, label_smoothing=0.2)
        weighted = ops.linear_cross_entropy(
            output, items, target, temperature=0.7, label_smoothing=0.2, weight_n=weight
        )
    torch.testing.assert_close(found, each.mean())
    torch.testing.assert_close(weighted, (weight * each).sum())


@loss_backends
@pytest.mark.parametrize("n", [0, 1, 50, 400])
def test_only_what_is_wanted_and_the_same(backend, n):
    """One gradient of two, or none, are those of both to the bit; without a gradient the loss is."""
    call = (*tensors(n, 9, 260), {"label_smoothing": 0.1})
    loss, g_output, g_items = value_and_gradients(backend, *call, torch.float32)
    assert torch.equal(value_and_gradients(backend, *call, torch.float32, (False, False))[0], loss)
    for wanted, expected in (((True, False), g_output), ((False, True), g_items)):
        found = value_and_gradients(backend, *call, torch.float32, wanted)
        assert torch.equal(found[0], loss)
        torch.testing.assert_close(found[1], expected)
    with torch.no_grad(), ops.use_backend(backend):
        again = ops.linear_cross_entropy(*[t.float() for t in call[:2]], call[2], label_smoothing=0.1)
    assert torch.equal(again, loss) and not again.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@loss_backends
def test_half_precision_is_summed_in_float32(backend, dtype):
    output, items, target = (t.to(dtype) if t.is_floating_point() else t for t in tensors(200, 16, 3000))
    expected = value_and_gradients("reference", output.double(), items.double(), target, {}, torch.float64)
    found = value_and_gradients(backend, output, items, target, {}, dtype)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=0)
    close(found[1:], expected[1:], torch.finfo(dtype).eps)


@loss_backends
def test_more_items_than_float32_counts(backend):
    """Of 17 million items a million takes part, and each is as likely as any other."""
    real, everything = 2**20, 2**24 + 2**20
    mask = torch.arange(everything) < real
    with ops.use_backend(backend):
        loss = ops.linear_cross_entropy(
            torch.ones(1, 1), torch.ones(everything, 1), torch.tensor([0]), mask_V=mask, label_smoothing=0.2
        )
    assert loss.item() == pytest.approx(math.log(real), rel=1e-5)


@loss_backends
def test_what_stands_out_of_the_list(backend):
    """An item that the mask leaves out changes nothing and gets no gradient; a target left out loses infinitely."""
    output, items, target = tensors(30, 8, 100)
    mask = torch.ones(100, dtype=torch.bool)
    mask[:50] = False
    keywords = {"mask_V": mask, "label_smoothing": 0.1}
    _, _, gradient = value_and_gradients(backend, output, items, target % 50 + 50, keywords, torch.float32)
    assert (gradient[:50] == 0).all() and (gradient[50:] != 0).all()
    found = value_and_gradients(backend, output, items, target % 50 + 50, keywords, torch.float64)
    rest = value_and_gradients("torch", output, items[50:], target % 50, {"label_smoothing": 0.1}, torch.float64)
    torch.testing.assert_close(found[:2], rest[:2])
    with ops.use_backend(backend):
        assert ops.linear_cross_entropy(output.float(), items.float(), target % 50, mask_V=mask) == torch.inf


@loss_backends
def test_extreme_logits(backend):
    """Targets without any chance and targets without a rival: finite, and right."""
    output, items, target = tensors(64, 16, 700)
    close(
        value_and_gradients(backend, 100 * output, 10 * items, target, {}, torch.float32),
        value_and_gradients("reference", 100 * output, 10 * items, target, {}, torch.float64),
        1e-4,
    )


@loss_backends
def test_nan_stays_visible(backend):
    for spoilt in range(2):
        given = [t.float() for t in tensors(40, 8, 300)[:2]]
        given[spoilt][7, 3] = torch.nan
        with ops.use_backend(backend):
            assert ops.linear_cross_entropy(*given, torch.zeros(40, dtype=torch.int64)).isnan()


@loss_backends
def test_no_second_derivative(backend):
    output, items, target = tensors(5, 4, 9)
    with ops.use_backend(backend):
        if backend == "reference":
            assert torch.autograd.gradgradcheck(
                lambda o, i: ops.linear_cross_entropy(o, i, target), (output.requires_grad_(), items.requires_grad_())
            )
            return
        output = output.float().requires_grad_()
        loss = ops.linear_cross_entropy(output, items.float(), target)
        (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            gradient.sum().backward()


def test_compilers_see_through_the_op():
    """Without a graph break, so to the kernels where there are any."""
    output, items, target = (t.float() if t.is_floating_point() else t for t in tensors(150, 8, 1500))
    given = output.requires_grad_(), items.requires_grad_()
    expected = ops.linear_cross_entropy(*given, target)
    compiled = torch.compile(ops.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    found = compiled(*given, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, given), torch.autograd.grad(expected, given))


@needs_kernels
def test_the_operator_keeps_the_rules_of_torch_library():
    output, items, target = (t.float() if t.is_floating_point() else t for t in tensors(9, 8, 30))
    call = (output, items, target, None, None, None, 1.0, 0.1, [True, False])
    torch.library.opcheck(torch.ops.recbole_ssm.linear_cross_entropy.default, call, test_utils="test_schema")
    torch.library.opcheck(torch.ops.recbole_ssm.linear_cross_entropy.default, call, test_utils="test_faketensor")


@pytest.mark.parametrize("kernels", [True, False])
def test_what_fits_the_cache_is_pytorchs(monkeypatch, kernels):
    """No tile, and no more than PyTorch does, where it is as fast: without the kernels up to larger calls."""
    module = sys.modules["recbole_ssm.ops.linear_cross_entropy"]
    asked = []
    monkeypatch.setattr(module, "dispatch", lambda op, x: asked.append(len(x)) or module._reference)
    monkeypatch.setattr(module, "implementations", lambda op, backend: [1] if kernels else [])
    for n in (10, 100, 1000, 3000):
        output, items, target = (t.float() if t.is_floating_point() else t for t in tensors(n, 4, 1000))
        loss = ops.linear_cross_entropy(output, items, target)
        torch.testing.assert_close(loss, F.cross_entropy(output @ items.T, target))
    assert asked == ([1000, 3000] if kernels else [3000])
    asked.clear()
    with ops.use_backend("torch"):
        ops.linear_cross_entropy(output[:10], items, target[:10])
    assert asked == [10]
    for wrong in ((output[:, :3], items, target), (output, items, target[:-1])):
        with pytest.raises(ValueError, match="linear_cross_entropy: .* must have shape"):
            ops.linear_cross_entropy(*wrong)


@loss_backends
def test_rows_may_be_retained(backend):
    """Two backward passes through one forward."""
    output, items, target = tensors(20, 4, 50)
    output = output.float().requires_grad_()
    with ops.use_backend(backend):
        loss = ops.linear_cross_entropy(output, items.float(), target)
    (one,) = torch.autograd.grad(loss, output, retain_graph=True)
    (other,) = torch.autograd.grad(loss, output, torch.tensor(2.0))
    assert torch.equal(2 * one, other)


def test_wrong_calls_are_told():
    output, items, target = tensors(5, 4, 9)
    for keywords, text in (
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"label_smoothing": 1.0}, "label_smoothing must be within"),
        ({"label_smoothing": 0.1, "candidates_K": target}, "takes no candidates"),
        ({"bias_V": torch.zeros(9, requires_grad=True)}, "must not require one"),
        ({"bias_V": torch.zeros(8)}, r"bias must have shape \[9\], got \[8\]"),
    ):
        with pytest.raises(ValueError, match=text):
            ops.linear_cross_entropy(output, items, target, **keywords)
    with pytest.raises(ValueError, match=r"items must have shape \[V, 4\], got \[9, 3\]"):
        ops.linear_cross_entropy(output, items[:, :3], target)


@pytest.mark.parametrize("backend", [b for b in available_backends("linear_cross_entropy") if b != "reference"])
def test_no_matrix_of_rows_and_items_is_held(backend, monkeypatch):
    monkeypatch.setitem(sys.modules["recbole_ssm.ops.linear_cross_entropy"].TILE, "cpu", 2**16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.nbytes)
            return result

    output, items, target = tensors(4000, 6, 500)
    with Watch():
        value_and_gradients(backend, output, items, target, {}, torch.float32)
    assert largest < 4000 * 500 * 4 / 4


def test_few_logits_are_left_to_pytorch():
    """Where no backend is asked for; the result is the same."""
    output, items, target = (t.float() if t.is_floating_point() else t for t in tensors(100, 8, 200))
    output.requires_grad_()
    small = ops.linear_cross_entropy(output, items, target)
    assert "_Loss" not in str(small.grad_fn)
    with ops.use_backend("torch"):
        tiled = ops.linear_cross_entropy(output, items, target)
    assert "_Loss" in str(tiled.grad_fn)
    torch.testing.assert_close(small, tiled)
    many = output.repeat(100, 1)
    assert "_Loss" in str(ops.linear_cross_entropy(many, items, target.repeat(100)).grad_fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", *available_backends("linear_cross_entropy")])
def test_items_that_do_not_exist(backend, dtype):
    """Also -100, whose rows PyTorch's loss leaves out."""
    output, items, _ = (t.to(dtype) if t.is_floating_point() else t for t in tensors(5, 4, 9))
    some = torch.tensor([1])
    for target, candidates in ((9, None), (-1, None), (-100, None), (-100, some), (-1, some), (0, torch.tensor([9]))):
        with ops.use_backend(backend), pytest.raises((IndexError, RuntimeError), match="ut of|none of"):
            ops.linear_cross_entropy(output, items, torch.full((5,), target), candidates_K=candidates)
    with ops.use_backend(backend), pytest.raises(ValueError, match="candidates_K is empty"):
        ops.linear_cross_entropy(output, items, torch.zeros(5, dtype=torch.long), candidates_K=some[:0])


@rank_backends
def test_what_was_seen_must_be_there(backend):
    output, items, target = (t.float() if t.is_floating_point() else t for t in tensors(3, 4, 9))
    for rows, seen, what in (([0, 3], [1, 2], "rows from 0 to 3"), ([0, 1], [-1, 9], "items from -1 to 9")):
        with ops.use_backend(backend), pytest.raises(ValueError, match=what):
            ops.rank_targets(output, items, target, seen=(torch.tensor(rows), torch.tensor(seen)))


@pytest.mark.skipif("native" not in available_backends("rank_targets"), reason="no kernels of C++")
@pytest.mark.parametrize(
    ("seen", "offsets"),
    [([1, 2], [0, 1, 2]), ([1, 2], [0, 1, 2, 7]), ([1, 2], [0, 2, 1, 2]), ([7, 2], [0, 2, 2, 2]), ([9], [0, 1, 1, 1])],
    ids=["too few bounds", "beyond the end", "falling bounds", "falling items", "no such item"],
)
def test_the_kernel_refuses_lists_that_do_not_fit(seen, offsets):
    output, items, _ = (t.float() for t in tensors(3, 4, 9))
    lists = ops.Seen(torch.tensor(seen), torch.tensor(offsets))
    with ops.use_backend("native"), pytest.raises(IndexError, match="what rows have seen"):
        ops.rank_targets(output, items, torch.zeros(3, dtype=torch.long), seen=lists)


def a_list(data):
    n = data.draw(st.sampled_from([0, 1, 2, 17, 40, 300]), label="n")
    d = data.draw(st.sampled_from([1, 3, 16, 33]), label="d")
    V = data.draw(st.sampled_from([1, 2, 31, 240, 241, 700]), label="V")
    output, items, target = tensors(n, d, V, data.draw(st.integers(0, 1000)))
    keywords = {}
    if data.draw(st.booleans(), label="mask"):
        keywords["mask_V"] = (torch.rand(V) < 0.7).index_fill(0, target, True)
    if data.draw(st.booleans(), label="seen"):
        count = data.draw(st.sampled_from([0, 5, 400]), label="seen items") if n else 0
        keywords["seen"] = (torch.randint(0, max(n, 1), (count,)), torch.randint(0, V, (count,)))
    # small whole numbers: their products are exact in any order, so ties are ties for every backend
    return (output * 2).round(), (items * 2).round(), target, keywords


@rank_backends
@given(data=st.data())
def test_ranks_equal_the_reference(backend, data):
    output, items, target, keywords = a_list(data)
    with ops.use_backend("reference"):
        expected = ops.rank_targets(output, items, target, **keywords)
    for dtype in (torch.float64, torch.float32):
        with ops.use_backend(backend):
            found = ops.rank_targets(output.to(dtype), items.to(dtype), target, **keywords)
        assert torch.equal(found.higher, expected.higher) and torch.equal(found.ties, expected.ties)


@rank_backends
def test_ranks_by_hand(backend):
    items = torch.tensor([[9.0], [1.0], [2.0], [2.0], [3.0], [torch.nan]])
    mask = torch.tensor([False, True, True, True, True, True])
    output, target = torch.tensor([[1.0], [1.0], [-1.0], [1.0]]), torch.tensor([3, 1, 1, 5])
    seen = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([4, 4, 3, 2, 1])
    with ops.use_backend(backend):
        found = ops.rank_targets(output, items, target, mask_V=mask, seen=seen)
    # higher than 2: 3 and the NaN, alike 2; the target stays although it was seen; a NaN stands behind all
    assert found.higher.tolist() == [[2, 1], [4, 3], [1, 1], [5, 5]]
    assert found.ties.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    assert found.ranks.tolist() == [[3.5, 2.5], [5, 4], [2, 2], [6, 6]]


@rank_backends
def test_ranks_of_many_rows_are_those_of_each(backend):
    output, items, target = (t.float() if t.is_floating_point() else t for t in tensors(600, 24, 900))
    seen = torch.randint(0, 600, (5000,)), torch.randint(0, 900, (5000,))
    with ops.use_backend(backend):
        whole = ops.rank_targets(output, items, target, seen=seen)
        for r in (0, 255, 256, 599):
            own = seen[1][seen[0] == r]
            one = ops.rank_targets(output[r : r + 1], items, target[r : r + 1], seen=(torch.zeros_like(own), own))
            assert torch.equal(one.higher[0], whole.higher[r]) and torch.equal(one.ties[0], whole.ties[r])
    assert (whole.higher[:, 1] <= whole.higher[:, 0]).all() and (whole.higher[:, 1] < whole.higher[:, 0]).any()


# --- the C++ kernels ----------------------------------------------------------------------------------------------


@needs_kernels
@given(data=st.data())
def test_every_instruction_set_equals_the_reference(instruction_set, data):
    output, items, target, keywords = a_call(data)
    expected = value_and_gradients("reference", output, items, target, keywords, torch.float64)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: whatever a kernel leaves unwritten shows
    try:
        found = value_and_gradients("native", output, items, target, keywords, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    close(found, expected, 3e-5)


@needs_kernels
@given(data=st.data())
def test_ranks_of_every_instruction_set(instruction_set, data):
    output, items, target, keywords = a_list(data)
    with ops.use_backend("reference"):
        expected = ops.rank_targets(output, items, target, **keywords)
    with ops.use_backend("native"):
        found = ops.rank_targets(output.float(), items.float(), target, **keywords)
    assert torch.equal(found.higher, expected.higher) and torch.equal(found.ties, expected.ties)


@needs_kernels
@pytest.mark.parametrize("n,d,V", [(3000, 20, 300), (700, 30, 4000), (40, 33, 20_000)])
@pytest.mark.parametrize("sampled", [False, True])
def test_threads_do_not_change_a_byte_of_the_loss(n, d, V, sampled):
    output, items, target = tensors(n, d, V)
    keywords = {"candidates_K": torch.randint(0, V, (V // 2,))} if sampled else {"label_smoothing": 0.1}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found = value_and_gradients("native", output, items, target, keywords, torch.float32)
        with ops.use_backend("native"):
            found += ops.rank_targets(output.float(), items.float(), target, seen=(torch.arange(n), target.flip(0)))
        results.append(found)
    torch.set_num_threads(1)
    for one, *others in zip(*results):
        assert all(torch.equal(one, other) for other in others)


@needs_kernels
@pytest.mark.parametrize("form", MEMORY, ids=lambda form: form.replace(" ", "_"))
def test_memory_of_the_loss_may_lie_anyhow(form):
    output, items, target = (t.float() if t.is_floating_point() else t.int() for t in tensors(50, 12, 400))
    lay = MEMORY[form]
    bias = torch.linspace(-1, 1, 400)
    with ops.use_backend("native"):
        expected = ops.linear_cross_entropy(output, items, target.long(), bias_V=bias)
        assert torch.equal(ops.linear_cross_entropy(lay(output), lay(items), target, bias_V=bias), expected)
        ranks = ops.rank_targets(output, items, target.long())
        assert torch.equal(ops.rank_targets(lay(output), lay(items), target).higher, ranks.higher)


def test_a_gpu_is_not_waited_for_in_the_backward():
    """On the device ``meta`` nothing has a value that could be read."""
    output, items = (torch.empty(5, 3, device="meta", requires_grad=True) for _ in range(2))
    target = torch.empty(5, dtype=torch.int64, device="meta")
    tiles = implementations("linear_cross_entropy", "torch")[0].function
    tiles(output, items, target, None, None, None, 1.0, 0.0).backward()
    assert output.grad.shape == items.grad.shape == (5, 3)
