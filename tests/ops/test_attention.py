"""Attention within packed sequences: by padding, and by the kernel of a GPU as far as its call can be tried without."""

import pytest
import torch

from recbole_ssm.ops import attention, packed_attention
from recbole_ssm.ops.packing import positions_of

BOUNDS = torch.tensor([0, 3, 3, 4, 20, 31, 31])


def plain(q, k, v, last_only):
    """Sequence by sequence, from the formula."""
    y = torch.zeros_like(q)
    for number, (begin, end) in enumerate(zip(BOUNDS.tolist(), BOUNDS.tolist()[1:])):
        for i in range(end - 1 if last_only and end > begin else begin, end):
            at = number if last_only else i
            weights = (k[begin : i + 1] * q[at]).sum(-1).div(q.shape[-1] ** 0.5).softmax(0)
            y[at] = (weights[..., None] * v[begin : i + 1]).sum(0)
    return y


def tensors(last_only, P=8):
    torch.manual_seed(0)
    total, sequences = int(BOUNDS[-1]), len(BOUNDS) - 1
    shapes = ((sequences if last_only else total), total, total)
    return [torch.randn(n, 2, P, dtype=torch.float64, requires_grad=True) for n in shapes]


def value_and_gradients(function, given):
    y = function(*given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, given, weights)]


@pytest.mark.parametrize("last_only", [False, True])
def test_it_is_the_formula(last_only):
    given = tensors(last_only)
    expected = value_and_gradients(lambda *t: plain(*t, last_only), given)
    found = value_and_gradients(lambda *t: packed_attention(*t, BOUNDS, 16, last_only=last_only), given)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("sequences", [0, 3])
@pytest.mark.parametrize("last_only", [False, True])
def test_empty_histories_alone_give_zeros(sequences, last_only):
    q, k = torch.randn(sequences if last_only else 0, 2, 8), torch.randn(0, 2, 8)
    y = packed_attention(q, k, k, torch.zeros(sequences + 1, dtype=torch.int64), 5, last_only=last_only)
    assert torch.equal(y, torch.zeros_like(q))


def kernel(query, key, value, *, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
           custom_mask_type, compute_log_sumexp):  # fmt: skip
    """What PyTorch's kernel computes, with NaN where nothing is said of it."""
    assert bias is None and compute_log_sumexp and dropout_p == 0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and query.is_contiguous()
    (query,), (key,), (value,) = query, key, value
    y = torch.full_like(query, torch.nan)
    for (a, b), (c, d) in zip(*(list(zip(t.tolist(), t.tolist()[1:])) for t in (cu_seqlens_q, cu_seqlens_k))):
        assert b - a <= max_seqlen_q and d - c <= max_seqlen_k
        if c == d:
            continue
        scores = torch.einsum("qhp,khp->hqk", query[a:b], key[c:d]) / query.shape[-1] ** 0.5
        if custom_mask_type == 1:
            scores = scores.masked_fill(torch.ones(b - a, d - c).triu(1).bool(), -torch.inf)
        y = y.index_put((torch.arange(a, b),), torch.einsum("hqk,khp->qhp", scores.softmax(-1), value[c:d]))
    return (y[None],)


@pytest.mark.parametrize("last_only", [False, True])
def test_the_call_of_the_kernel(last_only, monkeypatch):
    """On a stand-in that computes what PyTorch documents."""
    monkeypatch.setattr(attention, "_kernel", kernel)
    given = tensors(last_only)
    expected = value_and_gradients(lambda *t: packed_attention(*t, BOUNDS, 16, last_only=last_only), given)
    found = value_and_gradients(lambda *t: attention._varlen(*t, BOUNDS, 16, last_only, 0.0), given)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("last_only", [False, True])
def test_pytorch_takes_the_call(last_only):
    """Its shapes and its backward, without numbers."""
    given = [t.detach().to("meta").requires_grad_() for t in tensors(last_only)]
    y = attention._varlen(*given, BOUNDS.to("meta"), 16, last_only, 0.1)
    assert y.shape == given[0].shape
    assert [g.shape for g in torch.autograd.grad(y.sum(), given)] == [t.shape for t in given]


def test_a_cpu_pads():
    x = tensors(False)[0]
    assert not attention.reads_no_length(x.float())


def test_positions_need_no_look_at_the_bounds():
    found = positions_of(BOUNDS.to("meta"), 31)
    assert found.shape == (31,)
    expected = torch.cat([torch.arange(n) for n in BOUNDS.diff().tolist()])
    assert torch.equal(positions_of(BOUNDS, 31), expected) and torch.equal(positions_of(BOUNDS), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("P", [8, 6])
def test_on_a_gpu(last_only, P):
    given = [t.detach().float().requires_grad_() for t in tensors(last_only, P)]
    expected = value_and_gradients(lambda *t: packed_attention(*t, BOUNDS, 16, last_only=last_only), given)
    there = [t.detach().cuda().requires_grad_() for t in given]
    y = packed_attention(*there, BOUNDS.cuda(), 16, last_only=last_only)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    found = [y, *torch.autograd.grad(y, there, weights.float().cuda())]
    assert attention.reads_no_length(there[0]) == (P == 8)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.detach().cpu(), other.float(), atol=1e-5, rtol=1e-4)
