"""What a test says of a gain by time: query times shuffled among users, and targets apart by the time before them."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_ssm import distributed, run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.evaluation.metrics import AFTER_AN_HOUR, PAUSES, SAME_MOMENT, WITHIN_AN_HOUR, metric
from recbole_ssm.quick_start import configure
from recbole_ssm.study import child
from recbole_ssm.study.outcome import Outcome, Run
from recbole_ssm.study.runs import Runs
from recbole_ssm.trainer import Hook, Ranks

START = 978_300_000
HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
WAITS = [0, 70, 4_000, 90_000]
"""Seconds between events; each has an item of its own, which follows from it alone."""


def events(users=50, count=12):
    generator, rows = np.random.default_rng(0), []
    for user in range(users):
        waits = generator.integers(0, 4, count)
        times = START + np.cumsum([WAITS[wait] for wait in waits])
        rows += [f"u{user}\ti{wait}\t{time}" for wait, time in zip(waits, times)]
    return HEADER + "\n".join(rows) + "\n"


@pytest.fixture
def options(write_dataset):
    made = write_dataset(events())
    made["config_dict"] |= {"topk": [1], "valid_metric": "Hit@1", "state": "WARNING", "time": "query", "epochs": 0}
    return made


class Tests(Hook):
    """Counts the evaluations that hooks see."""

    seen = 0

    def on_evaluation_end(self, trainer, result):
        self.seen += 1


def test_a_gain_by_the_time_of_asking_goes_when_users_swap_their_times(options, capsys):
    learns = {"epochs": 8, "eval_step": 8, "hidden_size": 32, "train_batch_size": 64, "learning_rate": 0.03}
    options["config_dict"] |= learns
    ranks, count = Ranks(), Tests()
    found = run_recbole_ssm("GRU4Rec", **options, hooks=[ranks, count])
    shuffled, masked = found["test_result_shuffled_times"], found["test_result_shuffled_times_masked"]
    assert found["test_result"]["hit@1"] > 0.9 and shuffled["hit@1"] < 0.6 and masked.keys() == shuffled.keys()
    # Neither hooks nor groups take it for the test.
    assert count.seen == 2 and np.mean(ranks.ranks <= 1) == pytest.approx(found["test_result"]["hit@1"], abs=1e-4)
    moment, within, after = (found["test_by_group"][name] for name in (SAME_MOMENT, WITHIN_AN_HOUR, AFTER_AN_HOUR))
    assert moment["targets"] + within["targets"] + after["targets"] == 50 and min(moment["targets"], 5) == 5
    assert moment["hit@1"] > 0.9 and "masked ndcg@1" in after
    order = found["ranks"]["shuffled times"]
    assert metric("Hit@1", order).mean() == pytest.approx(shuffled["hit@1"], abs=1e-4)

    assert main(["evaluate", found["checkpoint"], "--device=cpu", "--json=out.json"]) == 0
    written, out = json.loads(Path("out.json").read_text()), capsys.readouterr().out
    assert written["shuffled_times"] == shuffled and written["shuffled_times_masked"] == masked
    assert written["by_group"] == found["test_by_group"] and written["metrics"] == found["test_result"]
    assert f"query times shuffled  unmasked  history masked\nhit@1                 {shuffled['hit@1']:8.4f}" in out
    # Validation is for choosing, and chooses by the times that were.
    assert main(["evaluate", found["checkpoint"], "--device=cpu", "--part=valid", "--json=out.json"]) == 0
    written = json.loads(Path("out.json").read_text())
    assert written["by_group"] == {} and "shuffled_times" not in written


@pytest.mark.parametrize("time", ["none", "gaps"])
def test_models_that_are_not_asked_by_time_are_tested_once(options, time):
    options["config_dict"]["time"] = time
    found = run_recbole_ssm("GRU4Rec", **options)
    assert found["test_result_shuffled_times"] is found["test_result_shuffled_times_masked"] is None
    assert "ranks" not in found and set(PAUSES[:3]) <= found["test_by_group"].keys()


def loader(options, **more):
    config = configure("GRU4Rec", config_dict=options["config_dict"] | more, dataset=options["dataset"])
    return create_loaders(config, create_dataset(config))[2]


def asked(rows):
    """Of all rows in order: users, targets, newest times, moments of asking."""
    columns = []
    for batch in rows:
        row = batch.interaction
        newest = row["timestamp_list"].amax(1)
        columns.append(np.stack([row["user_id"], batch.target, newest, row["timestamp"]]))
    return np.concatenate(columns, 1)


@pytest.mark.parametrize("split", [{"LS": "valid_and_test"}, {"GTS": [0.6, 0.2, 0.2]}])
def test_only_the_moments_change_and_by_a_permutation_of_the_waits(options, split):
    test = loader(options, eval_args={"split": split})
    before, after = asked(test), asked(test.with_shuffled_times())
    assert np.array_equal(before[:3], after[:3]) and not np.array_equal(before[3], after[3])
    waits, shuffled = before[3] - before[2], after[3] - after[2]
    assert sorted(waits) == sorted(shuffled) and np.array_equal(waits, test.pauses())
    # The rows themselves, and what was asked of the former loader, stay.
    assert np.array_equal(asked(test), before)
    small = loader(options, eval_args={"split": split}, eval_batch_size=3, worker=1)
    assert np.array_equal(asked(small.with_shuffled_times()), after)
    other = loader(options, eval_args={"split": split}, seed=7)
    assert not np.array_equal(asked(other.with_shuffled_times()), after)


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_ask_what_one_does(options, monkeypatch, rank):
    whole = loader(options)
    expected, waits = asked(whole.with_shuffled_times()), torch.from_numpy(whole.pauses())
    for name, value in (("world_size", 2), ("rank", rank), ("gather", [waits[::2], waits[1::2]])):
        monkeypatch.setattr(distributed, name, lambda *_, value=value: value)
    assert np.array_equal(asked(loader(options).with_shuffled_times()), expected[:, rank::2])


def test_data_without_clock_times_have_no_groups_by_time(toy, write_dataset, options):
    toy["config_dict"] |= {"epochs": 0}
    assert not set(PAUSES) & run_recbole_ssm("GRU4Rec", **toy)["test_by_group"].keys()
    assert loader(options, time="none", legacy_time_order=True).pauses() is None
    files = {"config_dict": {**options["config_dict"], "time": "none"}}
    for part in ("train", "valid", "test"):
        text = f"user_id:token\titem_id_list:token_seq\titem_id:token\nu1\ti1 i2\ti3\nu2\ti2 i{part}\ti1\n"
        files["dataset"] = write_dataset(text, name="split", suffix=f"{part}.inter")["dataset"]
    files["config_dict"] |= {"benchmark_filename": ["train", "valid", "test"], "load_col": None, "topk": [1]}
    assert loader(files).pauses() is None


def test_lists_that_a_data_set_of_recbole_holds_as_floats(options):
    plain = {key: value for key, value in options["config_dict"].items() if key in ("data_path", "load_col", "topk")}
    plain["valid_metric"] = "Hit@1"
    config = configure("DIEN", config_dict=plain, dataset=options["dataset"])
    rows = create_loaders(config, create_dataset(config))[2]
    assert rows.pauses().dtype == np.int64 and not rows.of_whole_days


def test_a_run_of_a_study_keeps_it(options, tmp_path):
    run = Run("GRU4Rec", "made", {"time": "query"})
    where = {"checkpoint_dir": str(tmp_path / "checkpoints")}
    content = Runs(tmp_path / "runs", options["config_dict"]).content(run)
    job = {"run": asdict(run), "options": options["config_dict"] | where, "content": content}
    (tmp_path / "run.json").write_text(json.dumps(job))
    assert child.main(tmp_path, io.StringIO()) == 0
    outcome = Outcome.read(tmp_path)
    assert outcome.test_shuffled_times.keys() == outcome.test.keys() == outcome.test_shuffled_times_masked.keys()
    users, ranks = outcome.ranks("shuffled times")
    assert np.array_equal(users, outcome.ranks()[0]) and not np.array_equal(ranks, outcome.ranks()[1])
    for order, figures in (("", outcome.test_shuffled_times), (" masked", outcome.test_shuffled_times_masked)):
        hit = np.mean(outcome.ranks(f"shuffled times{order}")[1] <= 1)
        assert hit == pytest.approx(figures["hit@1"], abs=1e-4)
    # What a former version left has none of it.
    values = json.loads((tmp_path / "outcome.json").read_text())
    for key in ("test_shuffled_times", "test_shuffled_times_masked"):
        del values[key]
    (tmp_path / "outcome.json").write_text(json.dumps(values))
    assert Outcome.read(tmp_path) == replace(outcome, test_shuffled_times={}, test_shuffled_times_masked={})
