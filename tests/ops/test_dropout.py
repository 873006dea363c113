"""Dropout: the mask is Threefry's bits, a function of a seed and a place, and as random as it should be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from recbole_ssm import ops
from recbole_ssm.layers import Dropout
from recbole_ssm.ops import native

needs_kernels = pytest.mark.skipif(bool(native.unusable), reason=f"native kernels: {native.unusable}")
BITS = 0xFFFFFFFF


def threefry(key, counter, rounds=13):
    """Threefry-2x32 of Salmon et al. 2011, in whole numbers."""
    keys = [*key, 0x1BD11BDA ^ key[0] ^ key[1]]
    x, y = (counter[0] + keys[0]) & BITS, (counter[1] + keys[1]) & BITS
    for done in range(rounds):
        bits = (13, 15, 26, 6, 17, 29, 16, 24)[done % 8]
        x = (x + y) & BITS
        y = ((y << bits | y >> (32 - bits)) & BITS) ^ x
        if done % 4 == 3:
            turn = done // 4 + 1
            x, y = (x + keys[turn % 3]) & BITS, (y + keys[(turn + 1) % 3] + turn) & BITS
    return x, y


def expected_mask(size, p, seed):
    """True where an element stays: 16 counters side by side, their first words and then their second ones."""
    words = {}
    for counter in range((size + 31) // 32 * 16):
        words[counter] = threefry((seed & BITS, seed >> 32), (counter & BITS, counter >> 32))
    return torch.tensor(
        [words[e // 32 * 16 + e % 16][e // 16 % 2] >= round(p * 2**32) for e in range(size)], dtype=torch.bool
    )


def test_the_generator_gives_its_authors_numbers():
    """Known answers that come with Random123."""
    assert threefry((0, 0), (0, 0)) == (0x9D1C5EC6, 0x8BD50731)
    assert threefry((BITS, BITS), (BITS, BITS)) == (0xFD36D048, 0x2D17272C)
    assert threefry((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)) == (0xBA3E4725, 0xF27D669E)
    assert threefry((0, 0), (0, 0), rounds=20) == (0x6B200159, 0x99BA4EFE)


@needs_kernels
@pytest.mark.usefixtures("instruction_set")
@given(size=st.sampled_from([0, 1, 15, 33, 200]), p=st.floats(0.001, 0.999), seed=st.integers(0, 2**63 - 1))
def test_the_mask_is_a_function_of_seed_and_place(size, p, seed):
    x = torch.randn(size)
    y = torch.ops.recbole_ssm.dropout(x, p, seed)
    mask = expected_mask(size, p, seed)
    torch.testing.assert_close(y, torch.where(mask, x / (1 - p), 0.0))


@needs_kernels
def test_neither_threads_nor_instruction_set_change_a_byte():
    x = torch.randn(3, 70_001)
    results = []
    for name in ("baseline", "avx2", "avx512"):
        if native.select(name):
            continue
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(torch.ops.recbole_ssm.dropout(x, 0.3, 12345))
    torch.set_num_threads(1)
    native.select("")
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_statistics_are_bernoullis(p):
    """Share, neighbours, columns and calls: each within five standard errors of what independent draws give."""
    torch.manual_seed(0)
    n, width = 2**21, 128
    drops = [(ops.dropout(torch.ones(n // width, width), p) == 0).double() for _ in range(2)]
    five = 5 * (p * (1 - p) / n) ** 0.5
    for drop in drops:
        assert abs(drop.mean() - p) < five
        flat = (drop - p).flatten()
        for lag in (1, 15, 16, 17, 32, 64, width, 4096):
            assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 * p * (1 - p) / (n - lag) ** 0.5
        for dim in (0, 1):
            sums = (drop - p).sum(1 - dim) / (p * (1 - p) * n / drop.shape[dim]) ** 0.5  # standard normal, nearly
            assert sums.abs().max() < 5.5 and abs(sums.var() - 1) < 5 * (2 / len(sums)) ** 0.5
    assert abs(((drops[0] - p) * (drops[1] - p)).mean()) < 5 * p * (1 - p) / n**0.5


def test_the_expectation_is_kept():
    torch.manual_seed(0)
    assert abs(ops.dropout(torch.ones(2**20), 0.2).mean() - 1) < 5 * (0.25 / 2**20) ** 0.5


@needs_kernels
def test_the_backward_has_the_same_mask_and_is_its_own_derivative():
    x = torch.randn(5, 37, requires_grad=True)
    y = ops.dropout(x, 0.4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient != 0, y != 0) and gradient.unique().numel() == 2
    (once,) = torch.autograd.grad(ops.dropout(x, 0.4).pow(2).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    torch.testing.assert_close(twice * x, once)
    torch.library.opcheck(torch.ops.recbole_ssm.dropout.default, (x, 0.4, 7))


@needs_kernels
def test_a_call_takes_one_draw_of_torchs_generator():
    """So a run that is resumed from the generator's state drops what it would have dropped."""
    x = torch.randn(1000)
    torch.manual_seed(3)
    first = ops.dropout(x, 0.5)
    state = torch.get_rng_state()
    second = ops.dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(ops.dropout(x, 0.5), second)
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpointing_drops_the_same_again():
    x = torch.randn(64, requires_grad=True)
    torch.manual_seed(0)
    (plain,) = torch.autograd.grad(ops.dropout(x, 0.5).square().sum(), x)
    torch.manual_seed(0)
    (again,) = torch.autograd.grad(checkpoint(lambda x: ops.dropout(x, 0.5), x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


def test_memory_may_lie_anyhow():
    x = torch.randn(6, 10)
    torch.manual_seed(0)
    expected = ops.dropout(x, 0.5)
    for form in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :10], torch.cat([x.new_zeros(1), x.flatten()])[1:]):
        torch.manual_seed(0)
        assert torch.equal(ops.dropout(form.view(6, 10) if form.dim() == 1 else form, 0.5), expected)


def test_nothing_all_and_what_is_no_probability():
    x = torch.randn(10)
    assert ops.dropout(x, 0.0) is x and ops.dropout(x, 0.5, training=False) is x
    assert not ops.dropout(x, 1.0).any()
    assert not ops.dropout(x, 1 - 1e-12).any()
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="within"):
            ops.dropout(x, p)


@pytest.mark.parametrize("backend", ops.available_backends())
def test_as_a_module_on_every_backend_and_in_other_precisions(backend):
    module = Dropout(0.5)
    with ops.use_backend(backend):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            y = module(torch.ones(1000, dtype=dtype))
            assert y.dtype == dtype and set(y.tolist()) == {0.0, 2.0}
    assert torch.equal(module.eval()(torch.ones(3)), torch.ones(3))


def test_torch_compiles_it():
    x = torch.ones(1000, requires_grad=True)
    y = torch.compile(lambda x: ops.dropout(x, 0.5), backend="aot_eager", fullgraph=True)(x)
    assert set(y.tolist()) == {0.0, 2.0}
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())
