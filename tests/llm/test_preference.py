"""ORPO's loss: the paper's formula, TRL's value in TRL's convention, gradients, and no logits that break it."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm.llm.preference import choose_rejected, log1mexp, log_odds, odds_ratio_loss, orpo_loss

DOUBLE = torch.float64


@given(st.lists(st.floats(-50, -1e-12), min_size=1, max_size=20))
def test_log1mexp_keeps_its_digits(values):
    expected = torch.tensor([math.log(-math.expm1(v)) for v in values], dtype=DOUBLE)
    torch.testing.assert_close(log1mexp(torch.tensor(values, dtype=DOUBLE)), expected, rtol=1e-12, atol=1e-15)


def test_the_papers_formula_from_probabilities():
    p_w, p_l = torch.tensor([0.7, 0.1], dtype=DOUBLE), torch.tensor([0.2, 0.6], dtype=DOUBLE)
    ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    expected = -p_w.log() + 0.3 * -torch.log(torch.sigmoid(ratio.log()))
    torch.testing.assert_close(orpo_loss(-p_w.log(), p_w.log(), p_l.log(), 0.3), expected)


def test_several_rejected_are_averaged():
    nll, chosen, rejected = (torch.rand(shape, dtype=DOUBLE) for shape in ((3,), (3,), (3, 4)))
    each = torch.stack([orpo_loss(nll, -chosen, -r, 0.5) for r in rejected.T])
    torch.testing.assert_close(orpo_loss(nll, -chosen, -rejected, 0.5), each.mean(0))


def test_gradients():
    logits = torch.randn(4, 5, dtype=DOUBLE, requires_grad=True)
    rejected = torch.tensor([[1], [2], [3], [4]])

    def loss(logits):
        log_p = logits.log_softmax(-1)
        return orpo_loss(-log_p[:, 0], log_p[:, 0], log_p.gather(1, rejected), 0.7).sum()

    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_give_numbers(dtype, scale, sign):
    logits = (sign * scale * torch.tensor([[1.0, 0.0, -1.0]], dtype=dtype)).requires_grad_()
    log_p = logits.log_softmax(-1)
    loss = orpo_loss(-log_p[:, 0], log_p[:, 0], log_p[:, 1:], 0.1).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_odds_of_a_certainty_are_large_and_finite():
    assert log_odds(torch.zeros(1)).item() == pytest.approx(-math.log(torch.finfo(torch.float32).eps), rel=1e-3)
    assert odds_ratio_loss(torch.zeros(1), torch.tensor([-5.0])).item() < 1e-6


@pytest.mark.parametrize("which", ["random", "hardest", "all"])
def test_the_rejected_are_wrong_candidates(which):
    scores, target = torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 4.0]] * 20), torch.tensor([0, 1] * 20)
    rejected = choose_rejected(scores, target, which)
    assert (rejected != target[:, None]).all()
    assert rejected.shape == (40, 2 if which == "all" else 1)
    if which == "hardest":
        assert (rejected == 2).all()
    if which == "random":
        assert len(rejected[::2].unique()) == len(rejected[1::2].unique()) == 2


def test_trls_loss_on_the_same_rows(tmp_path):
    """TRL's convention: the likelihood of prompt and response, the odds from the mean over the response's tokens."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    orpo = pytest.importorskip("trl.experimental.orpo")
    datasets = pytest.importorskip("datasets")
    from recbole_ssm.llm.base import RANDOM_SIZES, _random_model, random_tokenizer

    texts = ["User history: (1) river (2) stone", "Candidate pool: (A) cloud (B) tiger"] * 3
    tokenizer = random_tokenizer(texts, 500)
    model = _random_model({**RANDOM_SIZES, "initializer_range": 0.2}, len(tokenizer), 0)
    rows = {"prompt": [texts[0], texts[1] * 2], "chosen": ["A", "B"], "rejected": ["B", "A"]}
    settings = orpo.ORPOConfig(str(tmp_path), beta=0.3, per_device_train_batch_size=2, report_to=[], bf16=False,
                               use_cpu=True, gradient_checkpointing=False, remove_unused_columns=False)  # fmt: skip
    trainer = orpo.ORPOTrainer(
        model=model, args=settings, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    theirs, _ = trainer.get_batch_loss_metrics(model, batch)

    def log_likelihoods(kind):
        tokens, mask = batch[f"{kind}_input_ids"], batch[f"{kind}_attention_mask"].bool()
        log_p = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        each = log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        response = batch[f"{kind}_labels"][:, 1:] != -100
        return each[mask[:, 1:]].mean(), (each * response).sum(-1) / response.sum(-1), response.sum(-1)

    whole, chosen, answered = log_likelihoods("chosen")
    _, rejected, _ = log_likelihoods("rejected")
    assert answered.tolist() == [2, 2]  # the letter, and the end
    ours = orpo_loss(-whole.expand(2), chosen, rejected, 0.3).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(ours, orpo_loss(-chosen, chosen, rejected, 0.3).mean(), rtol=1e-4)  # another convention
