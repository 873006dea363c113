"""LlamaRec's preferences in TRL's terms, and TRL's trainer on them."""

import json
import os
from pathlib import Path

import pytest
import torch

from recbole_ssm.errors import UserError
from tests.model.test_llamarec import SMALL, untrained, write_circle


@pytest.fixture
def circle(tmp_path):
    return {**SMALL, **write_circle(tmp_path / "data")}


@pytest.mark.parametrize(("rejected", "count"), [("random", 1), ("hardest", 1), ("all", 2)])
def test_rows_hold_the_right_letter_and_wrong_ones(circle, rejected, count):
    from recbole_ssm.trainer.trl import write_rows

    model, (train, _, _) = untrained(circle, orpo_rejected=rejected, train_rows=40)
    assert write_rows(model, train, Path("rows.jsonl")) == 40 * count
    for line in Path("rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        history, pool = row["prompt"].split("User history: (1) ")[1].split("; \n Candidate pool: ")
        titles = dict(entry[1:].split(") ") for entry in pool.split("\n\n")[0].split(" \n "))
        assert set(titles) == {"A", "B", "C"} and row["chosen"] != row["rejected"] in titles
        words = ["apple", "river", "stone", "cloud", "tiger", "piano"]
        assert titles[row["chosen"]] == words[(words.index(history) + 1) % 6]


def test_trls_trainer_changes_our_weights(circle, tmp_path):
    pytest.importorskip("trl")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from recbole_ssm.trainer.trl import orpo_trainer, write_rows

    model, (train, _, _) = untrained(circle, train_rows=16)
    write_rows(model, train, tmp_path / "rows.jsonl")
    before = [p.detach().clone() for p in model.language_model.parameters()]
    settings = {"learning_rate": 1e-3, "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    trainer = orpo_trainer(model, tmp_path / "rows.jsonl", tmp_path / "trl", **settings)
    loss = trainer.train().training_loss
    assert loss == loss and loss > 0
    assert any(not torch.equal(p, b) for p, b in zip(model.language_model.parameters(), before))


def test_only_letters_are_trls_answers(circle):
    from recbole_ssm.trainer.trl import preference_rows

    model, (train, _, _) = untrained(circle, verbalizer="embedding")
    with pytest.raises(UserError, match="verbalizer: TRL's rows are answered by letters, got embedding"):
        next(preference_rows(model, train))
