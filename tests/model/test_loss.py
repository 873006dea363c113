"""Losses against their definitions, values and gradients, in float64."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from recbole_ssm import ops
from recbole_ssm.errors import UserError
from recbole_ssm.model import loss
from recbole_ssm.model.loss import NextItemLoss


def tensors(n=9, v=31, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(n, d, dtype=torch.float64, generator=generator).requires_grad_()
    items = torch.randn(v, d, dtype=torch.float64, generator=generator).requires_grad_()
    return output, items, torch.randint(1, v, (n,), generator=generator)


def build(n_items=31, counts=None, **options):
    config = {"loss_type": "CE", "num_negatives": 8, "negative_power": 0.0, "gbce_t": 0.75}
    # Settings of before these keys have None.
    config |= {"label_smoothing": None, "logq_correction": None, **options}
    return NextItemLoss(config, SimpleNamespace(item_counter=counts or {}), n_items).double()


@pytest.mark.parametrize("tile", [1, 31, 500, 10**6])
@pytest.mark.parametrize("backend", ops.available_backends("linear_cross_entropy"))
def test_cross_entropy_over_all_items_is_pytorchs(monkeypatch, backend, tile):
    monkeypatch.setitem(sys.modules["recbole_ssm.ops.linear_cross_entropy"].TILE, "cpu", tile)
    output, items, target = tensors(n=40)
    expected = F.cross_entropy(output @ items.T, target)
    wanted = torch.autograd.grad(expected, (output, items))
    with ops.use_backend(backend):
        found = build()(output, items, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (output, items)), wanted)


@pytest.mark.parametrize("loss_type", ["CE", "sampled_softmax"])
def test_large_catalogues_are_never_held_whole(monkeypatch, loss_type):
    """No tensor of [targets, items] is made, forward or backward."""
    module = sys.modules["recbole_ssm.ops.linear_cross_entropy"]
    monkeypatch.setitem(module.TILE, "cpu", 8000)
    monkeypatch.setitem(module.SMALL, "cpu", 100_000)  # logits of a small catalogue
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    output, items, target = tensors(n=200, v=1000)
    with Watch():
        build(1000, loss_type=loss_type)(output, items, target).backward()
    assert largest <= 16_000 < 200 * 1000


def test_sampled_softmax_is_its_definition():
    output, items, target = tensors()
    counts = {item: item for item in range(1, 31)}
    sampled = build(loss_type="sampled_softmax", num_negatives=50, negative_power=0.5, counts=counts)
    torch.manual_seed(4)
    found = sampled(output, items, target)
    torch.manual_seed(4)
    sample = sampled.log_q.exp().multinomial(50, replacement=True)
    positive = (output * items[target]).sum(-1)
    logits = output @ items[sample].T - math.log(50) - sampled.log_q[sample]
    logits = logits.masked_fill(sample == target[:, None], -torch.inf)
    expected = (torch.logaddexp(positive, logits.logsumexp(-1)) - positive).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (output, items)), torch.autograd.grad(expected, (output, items))
    )


def test_without_logq_the_logits_stay_as_they_are():
    output, items, target = tensors()
    sampled = build(loss_type="sampled_softmax", num_negatives=50, logq_correction=False)
    torch.manual_seed(4)
    found = sampled(output, items, target)
    torch.manual_seed(4)
    sample = sampled.log_q.exp().multinomial(50, replacement=True)
    logits = (output @ items[sample].T).masked_fill(sample == target[:, None], -torch.inf)
    own = (output * items[target]).sum(-1, keepdim=True)
    expected = F.cross_entropy(torch.cat([own, logits], 1), torch.zeros_like(target))
    torch.testing.assert_close(found, expected)


def test_smoothed_targets_are_pytorchs():
    output, items, target = tensors()
    expected = F.cross_entropy(output @ items.T, target, label_smoothing=0.2)
    torch.testing.assert_close(build(label_smoothing=0.2)(output, items, target), expected)


def test_bpr_is_recboles():
    output, items, target = tensors()
    negative = torch.randint(1, 31, (9,))
    difference = (output * (items[target] - items[negative])).sum(-1)
    expected = -torch.log(1e-10 + torch.sigmoid(difference)).mean()
    torch.testing.assert_close(build(loss_type="BPR")(output, items, target, negative), expected)


@pytest.mark.parametrize("largest", [2**24, 30])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_sampled_softmax_estimates_the_sum_over_all_items(monkeypatch, power, largest):
    """Over many samples, exp(loss) averages to that of the full softmax: the correction leaves no bias. Neither does it
    where there are more items than PyTorch draws from.
    """
    monkeypatch.setattr(loss, "LARGEST_MULTINOMIAL", largest)
    output, items, target = tensors(n=3)
    counts = {item: item for item in range(1, 31)}
    sampled = build(loss_type="sampled_softmax", num_negatives=2000, negative_power=power, counts=counts)
    torch.manual_seed(0)
    with torch.no_grad():
        scores = output @ items.T
        full = scores[:, 1:].exp().sum(1)  # the padding item is never drawn
        wanted = (full / scores[torch.arange(3), target].exp()).log().mean()
        found = torch.stack([sampled(output, items, target) for _ in range(300)]).mean()
    assert abs(found - wanted) < 0.01


def test_samples_of_more_items_than_pytorch_draws_from(monkeypatch):
    """Each is drawn as often as its share says, and the padding never."""
    monkeypatch.setattr(loss, "LARGEST_MULTINOMIAL", 4)
    counts = {1: 1, 2: 5, 3: 2, 4: 2}
    sampled = build(5, counts, loss_type="sampled_softmax", num_negatives=100_000, negative_power=1.0)
    torch.manual_seed(0)
    found = torch.bincount(sampled._drawn(), minlength=5) / 100_000
    torch.testing.assert_close(found, torch.tensor([0.0, 0.1, 0.5, 0.2, 0.2]), atol=0.005, rtol=0)
    monkeypatch.undo()
    drawn = build(2**24 + 2, loss_type="sampled_softmax", num_negatives=1000)._drawn()
    assert drawn.min() > 0 and drawn.max() > 0.99 * 2**24 and drawn.unique().numel() > 990


def test_gbce_is_its_definition():
    """-(1 / (K + 1)) (log sigma(s+)^beta + sum log(1 - sigma(s-))), beta = a (t (1 - 1/a) + 1/a)."""
    output, items, target = tensors()
    generalised = build(loss_type="gBCE")
    torch.manual_seed(4)
    found = generalised(output, items, target)
    torch.manual_seed(4)
    sample = torch.randint(1, 31, (8,))
    alpha = 8 / 29
    beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)
    expected = 0.0
    for o, t in zip(output, target):
        terms = beta * torch.log(torch.sigmoid(o @ items[t]))
        terms = terms + sum(torch.log(1 - torch.sigmoid(o @ items[j])) for j in sample if j != t)
        expected = expected - terms / 9
    torch.testing.assert_close(found, expected / 9)


def test_gbce_cannot_sample_more_than_there_is():
    with pytest.raises(UserError, match="num_negatives: gBCE samples among the 29 items .*try num_negatives: 14"):
        build(loss_type="gBCE", num_negatives=30)


def test_gbce_without_calibration_is_binary_cross_entropy():
    output, items, target = tensors()
    torch.manual_seed(4)
    found = build(loss_type="gBCE", gbce_t=0.0)(output, items, target)
    torch.manual_seed(4)
    sample = torch.randint(1, 31, (8,))
    against = F.softplus(output @ items[sample].T).masked_fill(sample == target[:, None], 0).sum(-1)
    positive = F.softplus(-(output * items[target]).sum(-1))
    torch.testing.assert_close(found, ((positive + against) / 9).mean())


@pytest.mark.parametrize("loss_type", ["CE", "BPR", "sampled_softmax", "gBCE"])
def test_extreme_scores_stay_finite(loss_type):
    output, items, target = tensors()
    loss = build(loss_type=loss_type)(1e4 * output, items, target, target.flip(0))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(output.grad).all() and torch.isfinite(items.grad).all()
