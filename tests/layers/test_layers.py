"""Invariants 1 and 2 for mixers and blocks, and what they refuse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm import ops
from recbole_ssm.errors import UserError
from recbole_ssm.layers import Block, Hydra, Mamba, Mamba2
from recbole_ssm.ops.packing import cu_seqlens_of, last_of


def build(kind):
    torch.manual_seed(0)
    if kind == "Mamba":
        return Mamba(d_model=16, d_state=5, d_conv=4, expand=2).double()
    if kind == "Mamba2":
        return Mamba2(d_model=16, d_state=5, d_conv=4, expand=2, head_dim=8, n_groups=2).double()
    return Hydra(d_model=16, d_state=5, d_conv=7, expand=2, head_dim=8, n_groups=2).double()


KINDS = ["Mamba", "Mamba2", "Hydra"]
CAUSAL = KINDS[:2]


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", CAUSAL)
@given(L=st.integers(1, 40), cut=st.integers(0, 40))
def test_parallel_equals_steps_equals_chunks(kind, L, cut):
    block = Block(build(kind), 16, dropout=0.0, residual=True).double().eval()
    u = torch.randn(3, L, 16, dtype=torch.float64)
    whole, after = block(u)
    state, ys = block.mixer.alloc_state(3), []
    for t in range(L):
        y, state = block.step(u[:, t], state)
        ys.append(y)
    close(torch.stack(ys, 1), whole)
    close(state.conv_BDK, after.conv_BDK)
    close(state.ssm, after.ssm)
    cut = min(cut, L)
    if 0 < cut < L:
        first, state = block(u[:, :cut])
        second, state = block(u[:, cut:], state)
        close(torch.cat([first, second], 1), whole)
        close(state.ssm, after.ssm)


@pytest.mark.parametrize("kind", KINDS)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_packed_equals_alone_and_last_only_equals_the_last(kind, lengths):
    block = Block(build(kind), 16, dropout=0.0, residual=True).double().eval()
    cu_seqlens = cu_seqlens_of(torch.tensor(lengths))
    u = torch.randn(1, sum(lengths), 16, dtype=torch.float64)
    packed, _ = block(u, cu_seqlens=cu_seqlens)
    alone = [block(piece)[0] for piece in u.split(lengths, 1)]
    close(packed, torch.cat(alone, 1))
    last, _ = block(u, cu_seqlens=cu_seqlens, last_only=True)
    close(last, last_of(packed, cu_seqlens))
    if kind == "Hydra":
        close(block(u, cu_seqlens=cu_seqlens.int(), last_only=True)[0], last)
    for piece, expected in zip(u.split(lengths, 1), alone):
        close(block(piece, last_only=True)[0], expected[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_left_out_where_it_is_not_wanted(kind):
    block = Block(build(kind), 16, dropout=0.0, residual=True).double().eval()
    u = torch.randn(3, 9, 16, dtype=torch.float64)
    y, state = block(u, return_state=False)
    assert state is None
    assert torch.equal(y, block(u)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_last_only_has_the_same_gradients(kind):
    lengths = [4, 1, 9]
    cu_seqlens = cu_seqlens_of(torch.tensor(lengths))
    u = torch.randn(1, 14, 16, dtype=torch.float64)
    weight = torch.randn(3, 16, dtype=torch.float64)
    gradients = []
    for last_only in (False, True):
        mixer = build(kind)
        y, _ = mixer(u, cu_seqlens=cu_seqlens, last_only=last_only)
        y = y if last_only else last_of(y, cu_seqlens)
        (y * weight).sum().backward()
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in mixer.named_parameters()})
    for name in gradients[0]:
        close(gradients[0][name], gradients[1][name])


@pytest.mark.parametrize("joint", [False, True])
def test_mamba2_normalises_each_group_as_upstream_does(joint):
    """mamba_ssm's RMSNormGated with ``group_size = d_ssm // ngroups``; version 0.1.0 had one norm over all channels."""
    mixer = Mamba2(16, 4, 4, 2, head_dim=8, n_groups=2, joint_norm=joint).double()
    torch.nn.init.normal_(mixer.norm.weight)
    y, z = torch.randn(2, 3, 5, 32, dtype=torch.float64)
    x = y * z * torch.sigmoid(z)
    groups = x.view(3, 5, 1 if joint else 2, -1)
    scale = 1 / torch.sqrt(groups.square().mean(-1, keepdim=True) + 1e-5)
    expected = (groups * scale).view(3, 5, 32) * mixer.norm.weight @ mixer.out_proj.weight.T
    close(mixer._gate_and_project(y.view(3, 5, 4, 8), z), expected)


def test_a_step_of_no_size_behind_no_gap_is_finite():
    mixer = Mamba2(16, 5, 4, 2, head_dim=8, gap_decays=True)
    with pytest.raises(ValueError, match="gap: a mixer with gap_decays needs the gap before each event"):
        mixer(torch.randn(1, 3, 16))
    torch.nn.init.constant_(mixer.dt_bias, -120.0)
    y, _ = mixer(torch.randn(2, 9, 16), gap=torch.zeros(2, 9, dtype=torch.long))
    found = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
    assert torch.isfinite(y).all() and all(torch.isfinite(gradient).all() for gradient in found)


def test_the_state_of_mamba2_decays_through_gaps_as_it_is_written():
    """Values and gradients of the recurrence in the module's text; also in pieces, packed, and event by event."""
    torch.manual_seed(0)
    mixer = Mamba2(16, 5, 4, 2, head_dim=8, n_groups=2, gap_decays=True).double()
    torch.nn.init.uniform_(mixer.gap_rate, -2, 2)
    u, gap = torch.randn(2, 9, 16, dtype=torch.float64), torch.randint(0, 500, (2, 9))

    def as_written(u, gap):
        z, xBC, dt = mixer.in_proj(u).split([32, 32 + 2 * 2 * 5, 4], -1)
        padded = F.pad(xBC.transpose(1, 2), (3, 0))
        xBC = F.silu(F.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=52)).transpose(1, 2)
        x, B, C = xBC.split([32, 10, 10], -1)
        x, B, C = x.unflatten(-1, (4, 8)), *(t.unflatten(-1, (2, 5)).repeat_interleave(2, 2) for t in (B, C))
        dt, A, r = F.softplus(dt + mixer.dt_bias), -mixer.A_log.exp(), F.softplus(mixer.gap_rate)
        h, ys = u.new_zeros(len(u), 4, 8, 5), []
        for t in range(u.shape[1]):
            s = torch.log(1.0 + gap[:, t, None].double()) / 4
            decay = torch.exp((dt[:, t] + r * s) * A)
            h = decay[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            ys.append((h * C[:, t, :, None]).sum(-1) + mixer.D[:, None] * x[:, t])
        return mixer._gate_and_project(torch.stack(ys, 1), z)

    def gradients(y):
        return torch.autograd.grad((y * torch.linspace(-1, 1, 16)).square().sum(), list(mixer.parameters()))

    expected, (whole, after) = as_written(u, gap), mixer(u, gap=gap)
    close(whole, expected)
    for found, right in zip(gradients(whole), gradients(expected), strict=True):
        close(found, right)
    assert not torch.allclose(whole, mixer(u, gap=gap * 2)[0])
    first, state = mixer(u[:, :4], gap=gap[:, :4])
    second, state = mixer(u[:, 4:], state, gap=gap[:, 4:])
    close(torch.cat([first, second], 1), expected)
    close(state.ssm, after.ssm)
    bounds, packed = torch.tensor([0, 9, 18]), {"cu_seqlens": torch.tensor([0, 9, 18]), "gap": gap.flatten()}
    close(mixer(u.view(1, 18, 16), **packed)[0], expected.view(1, 18, 16))
    close(mixer(u.view(1, 18, 16), **packed, last_only=True)[0], last_of(expected.view(1, 18, 16), bounds))
    close(mixer(u[:, 4:], mixer(u[:, :4], gap=gap[:, :4])[1], gap=gap[:, 4:], last_only=True)[0], expected[:, -1])
    state = mixer.alloc_state(2)
    for t in range(9):
        y, state = mixer.step(u[:, t], mixer.after_gap(state, gap[:, t]))
        close(y, expected[:, t])


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_mixers_see_no_future(kind):
    mixer = build(kind)
    u = torch.randn(1, 9, 16, dtype=torch.float64)
    changed = u.clone()
    changed[:, 5:] += 1
    assert torch.equal(mixer(u)[0][:, :5], mixer(changed)[0][:, :5])


def test_hydra_sees_the_future_but_for_the_last_row_of_its_scan():
    mixer = build("Hydra")
    u = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    reach = torch.autograd.grad(mixer(u)[0][0, 2].sum(), u)[0][0].abs().sum(-1)
    assert (reach > 0).all()  # position 2 reads every position


def test_hydra_has_no_state():
    mixer = build("Hydra")
    with pytest.raises(NotImplementedError, match="bidirectional"):
        mixer.step(torch.zeros(1, 16), None)


@pytest.mark.parametrize("kind", CAUSAL)
def test_state_knows_its_size_and_moves(kind):
    mixer = build(kind).float()
    state = mixer.alloc_state(7)
    assert state.nbytes == 4 * (state.conv_BDK.numel() + state.ssm.numel())
    assert state.to(torch.float64).ssm.dtype == torch.float64
    assert not state.ssm.any()


@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_in_float32_and_copies_agree(kind):
    mixer = build(kind).float()
    u = torch.randn(2, 20, 16)
    with ops.use_backend("reference"):
        expected = mixer(u)[0]
    close(copy.deepcopy(mixer)(u)[0], expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_step_sizes_start_as_asked(kind):
    for dt_init, low, high in (("log_uniform", 1e-4, 0.11), ("zero_bias", 0.69, 0.70)):
        mixer = build(kind)
        mixer.dt_init = dt_init
        mixer.reset_dt()
        bias = mixer.dt_proj.bias if kind == "Mamba" else mixer.dt_bias
        start = torch.nn.functional.softplus(bias)
        assert (start >= low).all() and (start <= high).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Mamba2(16, 4, 4, 2, head_dim=12),
            "head_dim: 12 does not divide expand * hidden_size = 32; try head_dim: 8",
        ),
        (lambda: Mamba2(16, 4, 4, 2, 8, n_groups=3), "n_groups: 3 does not divide .* = 4; try n_groups: 2"),
        (lambda: Hydra(16, 4, 4, 2, 8), "d_conv: a centred convolution needs an odd width, got 4; try d_conv: 5"),
        (lambda: Mamba(16, 0, 4, 2), "d_state: must be a whole number above 0, got 0; try d_state: 1"),
        (lambda: Mamba(16, "x", 4, 2), "d_state: must be a whole number above 0, got 'x'; try d_state: 1"),
        (lambda: Mamba(16, 8.0, 4, 2), "d_state: must be a whole number above 0, got 8.0; try d_state: 8"),
        (lambda: Mamba(16, float("nan"), 4, 2), "d_state: must be a whole number above 0, got nan; try d_state: 1"),
        (lambda: Mamba(16, 4, 4, 2, "zero"), "dt_init: 'zero' is not one of log_uniform, zero_bias"),
    ],
)
def test_impossible_sizes_name_key_value_and_mend(make, message):
    with pytest.raises(UserError, match=message.replace("*", r"\*").replace(r".\*", ".*")):
        make()
