"""Rules that learn nothing: their scores by hand, and their way through the command, a file and a table."""

import pathlib
from collections import Counter

import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_ssm.cli import main
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.errors import UserError
from recbole_ssm.model import get_model
from recbole_ssm.quick_start import configure, load_recommender, run_recbole_ssm
from recbole_ssm.study import compare
from recbole_ssm.study.outcome import Run
from recbole_ssm.study.runs import Runs
from tests.conftest import REPOSITORY

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
# The test targets of a and d are the newest items of their histories, that of b the one before, that of c is new.
HISTORIES = {"a": "123344", "b": "134161", "c": "235436", "d": "6155355"}


@pytest.fixture
def options(write_dataset):
    lines = [f"{u}\t{item}\t{time}\n" for u, items in HISTORIES.items() for time, item in enumerate(items)]
    found = write_dataset(HEADER + "".join(lines))
    found["config_dict"] |= {"topk": [1, 3], "valid_metric": "MRR@3", "state": "WARNING"}
    return found


def test_popularity_counts_training_targets(options):
    config = configure("Pop", **options)
    train, _, test = create_loaders(config, create_dataset(config))
    model = get_model("Pop")(config, train._dataset)
    tokens = train._dataset.field2id_token["item_id"]
    counts = Counter(item for items in HISTORIES.values() for item in items[1:-2])
    assert {token: float(share) for token, share in zip(tokens, model.popularity) if share} == pytest.approx(
        {item: count / (max(counts.values()) + 1) for item, count in counts.items()}
    )
    rows = next(iter(test))[0]
    every = model.full_sort_predict(rows)
    assert torch.equal(every, model.popularity.expand(4, -1))
    every[:, 0] = 5.0
    assert model.popularity[0] == 0
    rows.update(Interaction({"item_id": torch.tensor([1, 2, 3, 4])}))
    assert torch.equal(model.predict(rows), model.popularity[1:5])


def test_the_newest_item_is_the_best_and_then_the_history_backwards(options):
    result = run_recbole_ssm("RepeatNewest", **options)
    assert result["test_result"] == pytest.approx(
        {"hit@1": 0.5, "ndcg@1": 0.5, "mrr@1": 0.5, "hit@3": 0.75, "ndcg@3": 0.6577, "mrr@3": 0.625}, abs=1e-4
    )
    recommender = load_recommender(result["checkpoint"], device="cpu")
    found = recommender.recommend(["6", "1", "6", "5"], k=6)
    assert [item for item, _ in found[:3]] == ["5", "6", "1"] and [score for _, score in found[:3]] == [4, 3, 2]
    assert main(["evaluate", result["checkpoint"], "--topk=[2]", "--valid_metric=Hit@2", "--json=found.json"]) == 0
    assert '"hit@2": 0.75' in pathlib.Path("found.json").read_text()
    popular = load_recommender(run_recbole_ssm("Pop", **options)["checkpoint"], device="cpu")
    others = [pair for pair in popular.recommend(["2"], k=6) if pair[0] not in "561"]
    assert found[3:] == others


@pytest.mark.parametrize("keys", [{"train_mode": "prefix"}, {"learner": "usgm", "learner_args": {"D": 10, "rho": 0.1}}])
def test_what_is_set_for_all_models_of_a_table_does_not_change_them(options, keys):
    expected = run_recbole_ssm("RepeatNewest", **options, saved=False)["test_result"]
    options["config_dict"] |= {"epochs": 3, "weight_decay": 0.1, **keys}
    assert run_recbole_ssm("RepeatNewest", **options, saved=False)["test_result"] == expected


@pytest.mark.slow
def test_a_table_that_holds_one(tmp_path, capsys):
    """Where item k is always followed by k + 1, to repeat is always wrong."""
    command = ["compare", "--models=RepeatNewest", "--datasets=toy", "--seeds=1", f"--folder={tmp_path / 'out'}"]
    assert main([*command, f"--data_path={REPOSITORY / 'dataset'}"]) == 0
    assert "| toy | RepeatNewest | 1 | .0000 |" in capsys.readouterr().out


def test_there_is_nothing_to_tune(tmp_path):
    run = Run("RepeatNewest", "toy")
    assert compare.samples(run, 3, 7, Runs(tmp_path).config(run)) == [{}] * 3


def test_they_carry_no_state(options):
    checkpoint = run_recbole_ssm("Pop", **options)["checkpoint"]
    with pytest.raises(UserError, match="session: Pop carries no state"):
        load_recommender(checkpoint).session(["1"])
