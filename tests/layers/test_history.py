"""Whole histories in one call: equal to the formula in float64, and the formula runs wherever the call must not."""

import copy
import itertools
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recbole_ssm import ops
from recbole_ssm.layers import Block, Hydra, Mamba, Mamba2, Recipe, history, in_one_call, outer_norms
from recbole_ssm.ops import native
from recbole_ssm.ops.backend import dispatch
from recbole_ssm.ops.packing import cu_seqlens_of
from tests.layers.test_step import SETS, assert_close

pytestmark = pytest.mark.skipif(bool(native.unusable), reason=f"native kernels: {native.unusable}")
ITEMS = 30


class Model(nn.Module):
    """What the call reads of a model, and its formula."""

    def __init__(self, mixers, d_model, residual, pre_norm=False, dropout=0.2):
        super().__init__()
        recipe = Recipe(pre_norm)
        self.item_embedding = nn.Embedding(ITEMS, d_model)
        self.norm, self.last_norm = outer_norms(d_model, recipe, eps=1e-5)
        self.blocks = nn.ModuleList(Block(mixer, d_model, dropout, residual, recipe) for mixer in mixers)
        for parameter in self.parameters():  # norms and biases of one and zero would hide a mistake
            nn.init.normal_(parameter, std=0.3)
        self.eval()

    @in_one_call
    def encode(self, items_L, cu_seqlens, *, last_only=False):
        u = self.norm(self.item_embedding(items_L))[None]
        for block in self.blocks:
            at_last = last_only and block is self.blocks[-1]
            u, _ = block(u, cu_seqlens=cu_seqlens, last_only=at_last, return_state=False)
        return self.last_norm(u if last_only else u[0])


def formula(model, items, bounds):
    return Model.encode.__wrapped__(model, items, bounds, last_only=True)


def build(kinds=("Mamba", "Mamba2", "Hydra"), d_model=16, N=5, K=3, heads=4, groups=2, residual=True, pre_norm=False):
    makers = {
        "Mamba": lambda: Mamba(d_model, N, K, 2),
        "Mamba2": lambda: Mamba2(d_model, N, K, 2, 2 * d_model // heads, groups),
        "Hydra": lambda: Hydra(d_model, N, K | 1, 2, 2 * d_model // heads, groups),
    }
    return Model([makers[kind]() for kind in kinds], d_model, residual, pre_norm)


def histories(*lengths):
    return torch.randint(ITEMS, (sum(lengths),)), cu_seqlens_of(torch.tensor(lengths))


@pytest.fixture
def calls(monkeypatch):
    """How often C++ was called."""
    dispatch("history", torch.zeros(1))  # tests the call itself before its first use
    made, run = [], native.run_history
    monkeypatch.setattr(native, "run_history", lambda call: made.append(1) or run(call))
    return made


@pytest.fixture(params=SETS)
def instruction_set(request):
    native.select(request.param)
    yield request.param
    native.select("")


@given(data=st.data())
def test_the_call_equals_the_formula(instruction_set, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    groups = data.draw(st.integers(1, 3))
    heads = groups * data.draw(st.integers(1, 3))
    model = build(
        data.draw(st.lists(st.sampled_from(["Mamba", "Mamba2", "Hydra"]), min_size=1, max_size=2)),
        heads * data.draw(st.sampled_from([1, 3, 8])),
        data.draw(st.sampled_from([1, 5, 16, 33])),
        data.draw(st.integers(1, 6)),
        heads,
        groups,
        data.draw(st.booleans()),
        data.draw(st.booleans()),
    )
    some = st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 16, 33, 64, 65, 130]), min_size=1, max_size=8)
    lengths = data.draw(some.filter(any))
    items, bounds = histories(*lengths)
    exact = copy.deepcopy(model).double()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: whatever a kernel leaves unwritten shows
    try:
        with torch.no_grad(), ops.use_backend("native"):
            found = model.encode(items, bounds, last_only=True)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        expected = formula(exact, items, bounds)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


@torch.no_grad()
def test_many_histories_are_those_of_each_whatever_the_threads(calls):
    model = build()
    items, bounds = histories(*range(40), 300, *[1] * 200)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(model.encode(items, bounds, last_only=True))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for s in (1, 7, 39, 40, 41, 240):
        own = items[bounds[s] : bounds[s + 1]]
        assert_close(model.encode(own, torch.tensor([0, len(own)]), last_only=True)[0], results[0][s].double())
    assert len(calls) == 9


@torch.no_grad()
def test_the_rule_is_told_at_debug_level(caplog, calls):
    model = build(["Mamba"])
    with caplog.at_level(logging.DEBUG):
        model.encode(*histories(20, 30), last_only=True)
        long = history.MOST_EVENTS["scan"] + 1
        model.encode(*histories(long), last_only=True)
        build(["Mamba2", "Hydra"]).encode(*histories(long), last_only=True)
    assert "encode: 50 positions of 2 histories in one call" in caplog.text
    assert f"encode: {long} positions of 1 histories layer by layer" in caplog.text
    assert f"encode: {long} positions of 1 histories in one call" in caplog.text
    assert len(calls) == 2


def test_what_the_call_does_not_compute_goes_to_the_formula(calls, monkeypatch):
    model, given_ = build(), histories(5, 9)
    model.encode(*given_, last_only=True).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "fc_D" not in name)
    with torch.no_grad():
        expected = formula(model, *given_)
        torch.testing.assert_close(model.encode(*given_)[given_[1][1:] - 1], expected)  # all positions
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            torch.testing.assert_close(model.encode(*given_, last_only=True), expected, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            model.encode(*given_, last_only=True)
        assert copy.deepcopy(model).bfloat16().encode(*given_, last_only=True).dtype == torch.bfloat16
        model.train()
        assert not torch.equal(model.encode(*given_, last_only=True), model.encode(*given_, last_only=True))
    with ops.use_backend("torch"), torch.no_grad():
        model.encode(*given_, last_only=True)
    assert not calls


@torch.no_grad()
def test_every_change_of_a_weight_is_seen(calls):
    model, given_ = build(), histories(5, 9)

    def check():
        found = model.encode(*given_, last_only=True)
        torch.testing.assert_close(found, formula(model, *given_), rtol=1e-5, atol=1e-5)
        return found

    seen = [check()]
    model.norm.weight.mul_(-2)
    seen.append(check())
    model.item_embedding = nn.Embedding(ITEMS, 16)
    seen.append(check())
    model.blocks[1] = build(["Hydra"]).blocks[0]
    seen.append(check())
    del model.blocks[2]
    seen.append(check())
    model.blocks[0].mixer.A_log.data = torch.randn_like(model.blocks[0].mixer.A_log)
    seen.append(check())
    assert all(not torch.allclose(one, other) for one, other in itertools.pairwise(seen)) and len(calls) == len(seen)
    nn.utils.parametrizations.weight_norm(model.blocks[0].mixer.out_proj)
    check()
    assert len(calls) == len(seen)


@torch.no_grad()
def test_wrong_items_and_bounds_are_errors():
    model = build(["Mamba"])
    wrong_bounds = [0, 3], [0, 2, 1, 2], [0, 2**40, 2], [0, -(2**40), 2]
    for items, bounds in (([1, ITEMS], [0, 2]), ([-1, 2], [0, 2]), *(([1, 2], bounds) for bounds in wrong_bounds)):
        with pytest.raises(IndexError, match="history: there is no item of such an id, or cu_seqlens do not rise"):
            model.encode(torch.tensor(items), torch.tensor(bounds), last_only=True)


@torch.no_grad()
def test_inputs_of_another_device_go_to_the_formula(calls, monkeypatch):
    """To the kernels an address is one of the CPU's memory."""
    model, (items, bounds) = build(), histories(5, 9)
    monkeypatch.setattr(history, "_formula", lambda *arguments: "formula")
    assert model.encode(items.to("meta"), bounds, last_only=True) == "formula"
    assert model.encode(items, bounds.to("meta"), last_only=True) == "formula"
    with pytest.raises(ValueError, match=r"read the CPU's memory; move the tensor \[14\] there from meta"):
        history.chain_of(model)(items.to("meta"), bounds)
    assert not calls


class Embedding(Model):
    def embed(self, items_L, clock=None):
        return self.inputs(self.item_embedding(items_L))


@pytest.mark.parametrize(
    ("inputs", "called"),
    [
        (lambda u: 2 * u, True),
        (torch.Tensor.double, False),
        (torch.Tensor.bfloat16, False),
        (lambda u: torch.cat([u, u], -1), False),
        (lambda u: u[:-1], False),
        (lambda u: u.to("meta"), False),
    ],
)
@torch.no_grad()
def test_the_call_takes_of_a_users_embed_what_it_can_read(calls, monkeypatch, inputs, called):
    model = build()
    model.__class__, model.inputs = Embedding, inputs
    monkeypatch.setattr(history, "_formula", lambda *arguments: "formula")
    found = model.encode(*histories(5, 9), last_only=True)
    assert bool(calls) == called == isinstance(found, torch.Tensor)


@torch.no_grad()
def test_hydra_still_has_no_step():
    block = build(["Hydra"]).blocks[0]
    with pytest.raises(NotImplementedError, match="no state to carry"):
        block.step(torch.randn(1, 16), None)
