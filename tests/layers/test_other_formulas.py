"""A kernel serves its own formula alone: whatever else a layer or a model computes is left to PyTorch."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recbole_ssm import ops
from recbole_ssm.layers import Block, FeedForward, Mamba, Mamba2, in_one_call
from recbole_ssm.layers.history import chain_of
from recbole_ssm.layers.step import prepared_of
from recbole_ssm.ops import native
from tests.layers.test_history import Model, build, formula, histories
from tests.layers.test_step import random_state

pytestmark = pytest.mark.skipif(bool(native.unusable), reason=f"native kernels: {native.unusable}")


def doubled(parent, method):
    """A subclass whose method gives twice what its parent's does."""

    def double(self, *inputs, **options):
        found = getattr(parent, method)(self, *inputs, **options)
        return (2 * found[0], found[1]) if isinstance(found, tuple) else 2 * found

    return type(f"Own{parent.__name__}", (parent,), {method: double})


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, which shows the layer's weight."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.more = linear, nn.Linear(linear.in_features, linear.out_features, bias=False)
        self.weight, self.in_features = linear.weight, linear.in_features
        self.out_features, self.bias = linear.out_features, linear.bias

    def forward(self, u):
        return self.linear(u) + self.more(u)


def of(path, **changed):
    """A change of attributes of one part of a model."""

    def change(model):
        for name, value in changed.items():
            part = model.get_submodule(path)
            setattr(part, name, value(getattr(part, name)) if callable(value) else value)

    return change


def other_class(path, parent, method):
    """Another object in the place of a part, with the same weights, whose method gives twice what it did."""

    def change(model):
        other = copy.copy(model.get_submodule(path))
        other.__class__ = doubled(parent, method)
        model.set_submodule(path, other)

    return change


def hooked(path, pre=False):
    def change(model):
        part = model.get_submodule(path)
        if pre:
            part.register_forward_pre_hook(lambda _, inputs: tuple(2 * t for t in inputs))
        else:
            part.register_forward_hook(
                lambda _, inputs, out: (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out
            )

    return change


MIXER, PART = "blocks.0.mixer", "blocks.0.feed_forward"
CHANGES = {
    "forward of a mixer": other_class(MIXER, Mamba, "forward"),
    "step of a mixer": other_class(MIXER, Mamba, "step"),
    "forward of a mixer, of the object itself": of(MIXER, forward=lambda f: functools.partial(_twice, f)),
    "forward of a block": other_class("blocks.0", Block, "forward"),
    "end of a block": other_class("blocks.0", Block, "_finish"),
    "feed-forward part": other_class(PART, FeedForward, "forward"),
    "feed-forward part, another": of("blocks.0", feed_forward=lambda _: nn.Linear(16, 16)),
    "linear layer": other_class("blocks.0.mixer.out_proj", nn.Linear, "forward"),
    "adapter": of(MIXER, out_proj=Adapted),
    "adapter of the feed-forward part": of(PART, w_1=Adapted),
    "activation": of(PART, activation=lambda _: F.relu),
    "residual": of("blocks.0", residual=False),
    "eps of a norm": of("blocks.0.norm", eps=1.0),
    "one more block": lambda model: model.blocks.append(copy.deepcopy(model.blocks[0])),
    "hook on a block": hooked("blocks.0"),
    "hook before a linear layer": hooked("blocks.0.feed_forward.w_2", pre=True),
    "hook on the first norm": hooked("norm"),
    "RMSNorm in a block": of("blocks.0", norm=lambda _: nn.RMSNorm(16)),
    "norm without a bias": of("blocks.0", norm=lambda _: nn.LayerNorm(16, bias=False)),
    "norm without weights": of(PART, norm=lambda _: nn.LayerNorm(16, elementwise_affine=False)),
    "no norm": of("", norm=lambda _: nn.Identity()),
    "first norm without weights": of("", norm=lambda _: nn.LayerNorm(16, elementwise_affine=False)),
    "last norm": of("", last_norm=lambda _: nn.Tanh()),
    "dropout that is none": of("blocks.0", dropout=lambda _: nn.Tanh()),
    "linear layer with a bias": of(MIXER, in_proj=lambda _: nn.Linear(16, 64)),
    "linear layer without a bias": of(PART, w_2=lambda _: nn.Linear(64, 16, bias=False)),
    "embeddings of limited length": of("item_embedding", max_norm=0.1),
}


def _twice(function, *inputs, **options):
    y, state = function(*inputs, **options)
    return 2 * y, state


def both(call):
    """What the backend that is chosen gives, and what PyTorch does."""
    with torch.no_grad():
        found = call()
        with ops.use_backend("torch"):
            return found, call()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_part_computes_what_it_says(change):
    model, given = build(["Mamba", "Mamba2"]), histories(5, 9)
    model.last_norm = nn.Identity()
    model.__class__ = _WithLastNorm
    u, state = torch.randn(2, 16), random_state(model.blocks[0].mixer, 2)

    def results():
        yield from both(lambda: model.encode(*given, last_only=True))
        yield from both(lambda: model.blocks[0].step(u, state)[0])

    before = list(results())
    assert chain_of(model).usable and prepared_of(model.blocks[0]).steps
    change(model)
    after = list(results())
    for found, expected in ((after[0], after[1]), (after[2], after[3])):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert after[0].shape != before[0].shape or not all(
        torch.allclose(one, other, rtol=1e-4) for one, other in zip(before, after)
    )


class _WithLastNorm(Model):
    @in_one_call
    def encode(self, items_L, cu_seqlens, *, last_only=False):
        return self.last_norm(Model.encode.__wrapped__(self, items_L, cu_seqlens, last_only=last_only))


def test_options_keep_the_kernel():
    class Narrow(Mamba2):
        def __init__(self):
            super().__init__(16, 5, 3, 1, 8)

    model, given = Model([Narrow(), Mamba(16, 5, 3, 2)], 16, residual=False), histories(5, 9)
    found, expected = both(lambda: model.encode(*given, last_only=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert chain_of(model).usable and all(prepared_of(block).steps for block in model.blocks)
    assert prepared_of(model.blocks[0].mixer).steps
    model.train()
    assert chain_of(model).drops


def test_each_field_that_a_kernel_reads_is_asked_for():
    """A kernel looks at no address before it reads there; so a layer without one of its weights is left to PyTorch."""
    for block in build().blocks:
        for name, p in list(block.named_parameters()):
            owner, attribute = block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            for other in (None, nn.Parameter(p[..., :1].detach().clone()), nn.Parameter(p.detach().double())):
                if other is not None and other.shape == p.shape and other.dtype == p.dtype:
                    continue
                setattr(owner, attribute, other)
                assert not prepared_of(block).usable, name
            setattr(owner, attribute, p)
            assert prepared_of(block).usable


class _Doubled(Model):
    def encode(self, items_L, cu_seqlens, *, last_only=False):
        return 2 * super().encode(items_L, cu_seqlens, last_only=last_only)


class _DoubledByFormula(Model):
    @in_one_call
    def encode(self, items_L, cu_seqlens, *, last_only=False):
        return super().encode(items_L, cu_seqlens, last_only=last_only)


@pytest.mark.parametrize("kind", [_Doubled, _DoubledByFormula])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_method_may_call_its_parents(kind, gradients):
    model, given = build(), histories(5, 9)
    with torch.set_grad_enabled(gradients):
        expected = model.encode(*given, last_only=True)
        model.__class__ = kind
        found = model.encode(*given, last_only=True)
    torch.testing.assert_close(found, (2 if kind is _Doubled else 1) * expected, rtol=1e-5, atol=1e-5)
    block, u = build(["Mamba"]).blocks[0], torch.randn(2, 16)
    state = random_state(block.mixer, 2)
    with torch.set_grad_enabled(gradients):
        expected = block.step(u, state)[0]
        block.__class__ = doubled(Block, "step")
        torch.testing.assert_close(block.step(u, state)[0], 2 * expected, rtol=1e-5, atol=1e-5)


class Keeping(Block):
    """A block of one's own that keeps what it has seen."""

    def forward(self, u, *arguments, **options):
        self.seen = u.detach()
        return super().forward(u, *arguments, **options)


@torch.no_grad()
def test_a_layer_may_keep_tensors():
    model, given = build(["Mamba2"]), histories(5, 9)
    model.blocks[0] = Keeping(model.blocks[0].mixer, 16, 0.2, residual=True).eval()
    for _ in range(3):
        found = model.encode(*given, last_only=True)
    torch.testing.assert_close(found, formula(model, *given))
    block = build(["Mamba"]).blocks[0]
    for _ in range(3):
        block.seen = torch.randn(4)
        assert prepared_of(block).steps


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_mixers_in_the_place_of_blocks(count):
    model, given = build(["Mamba2"], pre_norm=True), histories(5, 9)
    model.blocks = nn.ModuleList(build(["Mamba2"]).blocks[0].mixer for _ in range(count))
    found = model.encode(*given, last_only=True)
    torch.testing.assert_close(found, formula(model, *given), rtol=1e-5, atol=1e-5)
