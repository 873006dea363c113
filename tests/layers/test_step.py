"""One event through a layer: the C++ kernel equals the formula in float64, and steps aside wherever it must."""

import copy
import functools
import itertools
import pickle
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recbole_ssm import ops
from recbole_ssm.layers import Block, Mamba, Mamba2, MixerState, Recipe
from recbole_ssm.ops import native

needs_kernels = pytest.mark.skipif(bool(native.unusable), reason=f"native kernels: {native.unusable}")
SETS = [] if native.unusable else [name for name in ("baseline", "avx2", "avx512") if not native.select(name)]
if SETS:
    native.select("")
KINDS = ["Mamba", "Mamba2"]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=SETS)
def instruction_set(request):
    native.select(request.param)
    yield request.param
    native.select("")


def build(kind, d_model=16, N=5, K=4, expand=2, heads=4, groups=2, joint=False, pre_norm=False):
    if kind == "Mamba":
        mixer = Mamba(d_model, N, K, expand)
    else:
        mixer = Mamba2(d_model, N, K, expand, expand * d_model // heads, groups, joint_norm=joint)
    for parameter in mixer.parameters():  # norms and biases of one and zero would hide a mistake
        nn.init.normal_(parameter, std=0.3)
    block = Block(mixer, d_model, dropout=0.2, residual=True, recipe=Recipe(pre_norm))
    for norm in (block.norm, block.feed_forward.norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return block.eval()


def formula(layer):
    """The step in PyTorch, which the kernel is held against."""
    return functools.partial(type(layer).step.__wrapped__, layer)


def random_state(mixer, batch):
    return MixerState(*[torch.randn_like(t) for t in mixer.alloc_state(batch)])


def assert_close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6 * max(1.0, expected.abs().max().item()))


@needs_kernels
@each_kind
@given(data=st.data())
def test_kernel_equals_the_formula(kind, instruction_set, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    groups = data.draw(st.integers(1, 3))
    heads = groups * data.draw(st.integers(1, 3))
    d_model = heads * data.draw(st.sampled_from([1, 3, 8]))
    sizes = (
        data.draw(st.sampled_from([1, 5, 16, 33])),
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 3)),
        heads,
        groups,
    )
    block = build(kind, d_model, *sizes, pre_norm=data.draw(st.booleans()))
    block.residual = data.draw(st.booleans())
    exact = copy.deepcopy(block).double()
    batch = data.draw(st.sampled_from([0, 1, 2, 4, 5, 16, 19, 130]))
    for layer, oracle in ((block, exact), (block.mixer, exact.mixer)):
        u, state = torch.randn(batch, d_model), random_state(block.mixer, batch)
        before = MixerState(*[t.clone() for t in state])
        with torch.no_grad(), ops.use_backend("native"):
            y, after = layer.step(u, state)
            expected, state_expected = formula(oracle)(u.double(), state.to(torch.float64))
        if not batch:
            assert y.shape == u.shape
            continue
        assert_close(y, expected)
        assert_close(after.ssm, state_expected.ssm)
        assert torch.equal(after.conv_BDK[..., :-1], before.conv_BDK[..., 1:])
        assert_close(after.conv_BDK, state_expected.conv_BDK)
        assert torch.equal(state.ssm, before.ssm) and torch.equal(state.conv_BDK, before.conv_BDK)


def test_a_joint_norm_of_several_groups_is_left_to_the_formula():
    block = build("Mamba2", joint=True)
    u, state = torch.randn(3, 16), random_state(block.mixer, 3)
    with torch.no_grad():
        assert torch.equal(block.step(u, state)[0], formula(block)(u, state)[0])
        block.mixer.norm_groups = 2
        assert not torch.allclose(block.step(u, state)[0], formula(build("Mamba2", joint=True))(u, state)[0])


@needs_kernels
@each_kind
def test_extreme_steps_and_decays_stay_finite(kind, instruction_set):
    block = build(kind)
    with torch.no_grad():
        (block.mixer.dt_proj.bias if kind == "Mamba" else block.mixer.dt_bias).fill_(1e4)
        block.mixer.A_log.fill_(100.0)
        y, state = block.step(torch.randn(3, 16), random_state(block.mixer, 3))
    assert torch.isfinite(y).all() and torch.isfinite(state.ssm).all()


@needs_kernels
@each_kind
def test_threads_do_not_change_a_byte(kind):
    block = build(kind)
    u, state = torch.randn(300, 16), random_state(block.mixer, 300)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        with torch.no_grad():
            y, after = block.step(u, state)
        results.append((y, *after))
    torch.set_num_threads(1)
    for one, *others in zip(*results):
        assert all(torch.equal(one, other) for other in others)


@needs_kernels
@each_kind
def test_memory_may_lie_anyhow(kind):
    block = build(kind)
    u, state = torch.randn(4, 16), random_state(block.mixer, 4)
    crooked = MixerState(*[t.transpose(0, 1).contiguous().transpose(0, 1) for t in state])
    with torch.no_grad():
        for found, expected in zip(block.step(u.T.contiguous().T, crooked), block.step(u, state)):
            for f, e in zip(found, expected):
                assert torch.equal(f, e)


@each_kind
def test_every_change_of_a_weight_is_seen(kind):
    """The addresses of weights are kept from call to call; nothing stale is ever read."""
    block = build(kind)
    u, state = torch.randn(2, 16), random_state(block.mixer, 2)

    def check():
        with torch.no_grad():
            found, expected = block.step(u, state)[0], formula(block)(u, state)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return found

    seen = [check()]
    with torch.no_grad():
        block.mixer.out_proj.weight.mul_(2)
    seen.append(check())
    block.mixer.out_proj.weight.data = torch.randn(16, 32)
    seen.append(check())
    block.mixer.out_proj = nn.Linear(32, 16, bias=False)
    seen.append(check())
    block.mixer.A_log = nn.Parameter(torch.randn_like(block.mixer.A_log))
    seen.append(check())
    block.load_state_dict(build(kind).state_dict())
    seen.append(check())
    for one, other in itertools.pairwise(seen):
        assert not torch.allclose(one, other)
    block.double().float()
    assert torch.equal(check(), seen[-1])
    nn.utils.parametrizations.weight_norm(block.mixer.out_proj)
    check()


@each_kind
def test_gradients_dropout_and_half_precision_go_to_the_formula(kind):
    block = build(kind)
    u, state = torch.randn(2, 16), random_state(block.mixer, 2)
    y, _ = block.step(u, state)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    with torch.no_grad():
        block.train()
        assert not torch.equal(block.step(u, state)[0], block.step(u, state)[0])
        half = block.eval().bfloat16()
        assert half.step(u.bfloat16(), state.to(torch.bfloat16))[0].dtype == torch.bfloat16


@each_kind
def test_torch_traces_and_transforms_a_step(kind):
    block = build(kind)
    u, state = torch.randn(2, 16), random_state(block.mixer, 2)
    with torch.no_grad():
        expected, after = formula(block)(u, state)
        program = torch.export.export(_Step(block), (u, *state)).module()
        compiled = torch.compile(block.step, backend="aot_eager", fullgraph=True)
        along = torch.func.jvp(lambda u: block.step(u, state)[0], (u,), (u,))[1]
        rows = torch.func.vmap(lambda u, *s: block.step(u[None], MixerState(*[t[None] for t in s]))[0][0])(u, *state)
    for found in (program(u, *state)[0], compiled(u, state)[0], rows):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(program(u, *state)[2], after.ssm)
    assert along.abs().max() > 0


class _Step(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, u, conv, ssm):
        y, state = self.block.step(u, MixerState(conv, ssm))
        return y, *state


@needs_kernels
@each_kind
@torch.no_grad()
def test_what_does_not_fit_is_an_error(kind):
    block = build(kind)
    u, state = torch.randn(2, 16), random_state(block.mixer, 2)
    for wrong in ((u[:, :-1], state), (u[:1], state), (u, MixerState(state.conv_BDK[..., 1:], state.ssm))):
        with pytest.raises(ValueError, match="step: the input and the two parts of the state have shapes"):
            block.step(*wrong)
    with pytest.raises(ValueError, match="do not fit"):
        block.step(u, MixerState(state.conv_BDK, state.ssm[..., 1:]))


@each_kind
@torch.no_grad()
def test_layers_copy_and_pickle_after_a_step(kind):
    block = build(kind)
    u, state = torch.randn(2, 16), random_state(block.mixer, 2)
    y, _ = block.step(u, state)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin.step(u, state)[0], y)


@each_kind
def test_several_threads_may_step_one_layer(kind):
    block = build(kind)
    inputs = [(torch.randn(2, 16), random_state(block.mixer, 2)) for _ in range(4)]
    with torch.no_grad():
        expected = [block.step(*each)[0] for each in inputs]
    wrong = []

    def run(index):
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(block.step(*inputs[index])[0], expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
