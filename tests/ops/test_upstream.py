"""How mamba-ssm's and causal-conv1d's functions are called, on stand-ins with their signatures and semantics.

Their kernels need a GPU; there the self-test holds them against the reference before their first use.
"""

import sys
import types

import pytest
import torch

from recbole_ssm import ops
from recbole_ssm.ops import backend, triton
from recbole_ssm.ops.packing import cu_seqlens_of
from recbole_ssm.ops.triton import operators, upstream
from tests.ops.test_ops import arguments, assert_close


def bounds_of(seq_idx):
    """Theirs number the sequences of a row; ours bound them."""
    return None if seq_idx is None else cu_seqlens_of(torch.bincount(seq_idx[0]))


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    assert all(t.is_contiguous() for t in (u, delta, B, C)) and return_last_state
    u, delta, B, C, z = (None if t is None else t.transpose(1, 2) for t in (u, delta, B, C, z))
    with backend.force("selective_scan", backend.implementations("selective_scan", "torch")[0].function):
        y, final = ops.selective_scan(u, delta, A, B, C, D, z, dt_bias=delta_bias, dt_softplus=delta_softplus)
    return y.transpose(1, 2), final


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    assert x.stride(1) == 1 and x.shape[1] % 8 == 0 and 2 <= weight.shape[1] <= 4
    with backend.force("causal_conv1d", backend.implementations("causal_conv1d", "torch")[0].function):
        y, _ = ops.causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation, cu_seqlens=bounds_of(seq_idx))
    return y.transpose(1, 2)


@pytest.fixture
def libraries(monkeypatch):
    def module(name, **attributes):
        made = types.ModuleType(name)
        made.__dict__.update(attributes)
        made.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, made)

    module("mamba_ssm")
    module("mamba_ssm.ops")
    module("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    module("causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)


SIZES = (16, 5, 4, 3, 2, 4)


def held_against_torch(op, tensors, keywords, cu_seqlens=None):
    torch_form = backend.implementations(op.__name__, "torch")[0].function
    results = []
    for function in (torch_form, getattr(upstream, op.__name__)):
        inputs = [t.clone().requires_grad_() for t in tensors]
        with backend.force(op.__name__, function):
            y, state = op(*inputs, **keywords, cu_seqlens=cu_seqlens)
        results.append((y, state, *torch.autograd.grad(y.square().sum(), inputs)))
    for found, expected in zip(*results):
        assert (found is None) == (expected is None)
        if found is not None:
            assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_calls_that_they_know(libraries, packed, monkeypatch):
    for op in ("causal_conv1d", "selective_scan"):
        monkeypatch.setitem(operators.OPERATORS, op, lambda *arguments: pytest.fail("went to Triton"))
    lengths = torch.tensor([3, 1, 5])
    batch, L, S, cu_seqlens = (1, 9, 3, cu_seqlens_of(lengths)) if packed else (2, 9, 2, None)
    if not packed:
        tensors, keywords = arguments(ops.selective_scan, batch, L, S, torch.float32, SIZES)
        del keywords["state_BDN"]
        held_against_torch(ops.selective_scan, tensors, keywords)
        held_against_torch(ops.selective_scan, tensors[:5], keywords)
    tensors, keywords = arguments(ops.causal_conv1d, batch, L, S, torch.float32, SIZES)
    held_against_torch(ops.causal_conv1d, tensors, {"activation": "silu"}, cu_seqlens)


@pytest.mark.parametrize("op", [ops.selective_scan, ops.causal_conv1d], ids=lambda op: op.__name__)
def test_other_calls_go_to_ours(libraries, op, monkeypatch):
    asked = []
    monkeypatch.setitem(operators.OPERATORS, op.__name__, lambda *given: asked.append(1) or (given[0], given[0]))
    tensors, keywords = arguments(op, 1, 9, 2, torch.float32, SIZES)
    with backend.force(op.__name__, getattr(upstream, op.__name__)):
        op(*tensors, **keywords, cu_seqlens=torch.tensor([0, 4, 9]))
    assert asked


def test_installed(libraries):
    names = {op: [name for name, _ in upstream.installed(op)] for op in ("selective_scan", "causal_conv1d", "ssd")}
    assert names == {"selective_scan": ["mamba-ssm"], "causal_conv1d": ["causal-conv1d"], "ssd": []}
    assert [i.name for i in backend._implementations["ssd", "cuda"]][-2:] == ["triton", "triton, without pieces"]
    assert triton.unusable is backend._requirements["cuda"]
