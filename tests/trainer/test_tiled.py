"""The losses of RecBole's models over tiles are their own, values and gradients; others are left alone."""

import pytest
import torch

from recbole_ssm.model.registry import _recbole_models
from recbole_ssm.trainer import tiled
from tests.trainer.test_trainer import build


@pytest.fixture
def ours(monkeypatch):
    """How often a loss of ours was taken."""
    taken, op = [], tiled.linear_cross_entropy
    monkeypatch.setattr(tiled, "linear_cross_entropy", lambda *call: taken.append(1) or op(*call))
    return taken


@pytest.mark.parametrize("name", ["NARM", "STAMP", "LightSANs", "BERT4Rec"])
def test_losses_are_theirs(name, toy, ours):
    trainer, train, _ = build(name, toy, train_neg_sample_args=None, train_batch_size=300)
    model, batch = trainer.model.eval(), next(iter(train)).parts[0].batch
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.2)  # zeros would hide a bias

    def value_and_gradients(loss):
        return loss, *torch.autograd.grad(loss, parameters, allow_unused=True)

    found = value_and_gradients(tiled.loss_of(model, batch))
    assert ours == [1]
    for f, e in zip(found, value_and_gradients(model.calculate_loss(batch))):
        assert (f is None) == (e is None)
        if f is not None:
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


def test_only_known_losses_are_taken(toy, ours):
    losses = {name: model.calculate_loss for name, model in _recbole_models().items()}
    known = [name for name, loss in losses.items() if tiled._same(loss, tiled.SASRec.calculate_loss)]
    assert {"FDSA", "GRU4Rec", "LightSANs", "NARM", "SASRec", "STAMP"} <= set(known)
    assert not {"BERT4Rec", "CORE", "GCSAN", "FEARec", "Caser"} & set(known)
    for name, options in (("NARM", {"loss_type": "BPR"}), ("CORE", {"train_neg_sample_args": None})):
        trainer, train, _ = build(name, toy, **options)
        tiled.loss_of(trainer.model, next(iter(train)).parts[0].batch)
    trainer, _, _ = build("NARM", toy, train_neg_sample_args=None)
    trainer.model.calculate_loss = lambda batch: "a loss of its own"
    assert tiled.loss_of(trainer.model, None) == "a loss of its own"
    assert tiled._tiled(trainer.model) is tiled._next_item
    trainer.model.loss_fct = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    assert tiled._tiled(trainer.model) is None and not ours
