"""Benchmarks run, and their rows hold what they promise; the figures themselves are nobody's test."""

import json
import signal
from pathlib import Path

import pytest

from recbole_ssm import bench
from recbole_ssm.bench.measure import in_a_process
from recbole_ssm.cli import main
from recbole_ssm.errors import UserError

REPOSITORY = Path(__file__).parent.parent.parent


def rows_of(tmp_path, *arguments):
    assert main(["bench", *arguments, f"--json={tmp_path / 'rows.json'}"]) == 0
    return json.loads((tmp_path / "rows.json").read_text())


def test_train(tmp_path, capsys):
    options = ["--datasets=toy", f"--data_path={REPOSITORY / 'dataset'}", "--models=2Mamba4Rec", "--seconds=0.2"]
    rows = rows_of(tmp_path, "train", *options, "--length=20", "--batch_size=128")
    assert [(row["name"], row["train_mode"]) for row in rows] == [
        ("RecBole SASRec", "prefix"),
        ("RecBole SASRec, as shipped", "prefix"),
        ("2Mamba4Rec", "prefix"),
        ("2Mamba4Rec", "packed"),
    ]
    assert [row["positions"] for row in rows[:2]] == [537 * 20] * 2
    assert rows[3]["positions"] == 537 < rows[2]["positions"]
    assert rows[0]["ratio_to_recbole"] == 1.0
    for row in rows:
        assert row["dataset"] == "toy" and row["steps"] == 5
        assert row["seconds_per_epoch"] > 0 and row["peak_memory_bytes"] > 10**7 and row["timed_steps"] >= 2
    assert "ratio_to_recbole" in capsys.readouterr().out


def test_dataset(tmp_path):
    rows = rows_of(tmp_path, "dataset", "--interactions=20000", "--steps=2", "--length=50")
    assert [(row["name"], row["interactions"]) for row in rows] == [
        ("packed", 20000),
        ("prefix", 20000),
        ("RecBole", 1000),
    ]
    for row in rows:
        assert row["raw_bytes"] == 24 * row["interactions"] and row["build_s"] > 0 and row["batch_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench: name one of convex: "),
        (["trian"], "bench: there is no benchmark 'trian'; did you mean 'train'?"),
        (["train", "--modles=x"], "recbole-ssm bench train: unrecognized arguments: --modles=x"),
        (["train", "--models=SASReck"], "bench train: argument --models: 'SASReck' is not one of SASRec, Mamba4Rec"),
        (["train", "--json=nosuch/x.json"], "--json: there is no folder"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError) as caught:
        bench.main(arguments)
    assert message in str(caught.value)


def test_tables():
    rows = [{"name": "a", "n": 12345, "s": 0.123456}, {"name": "long one", "n": 1, "s": 2.0}]
    assert bench.table(rows) == "name      n       s\na         12,345  0.1235\nlong one  1       2"
    assert bench.table([]) == "nothing was measured"


def test_a_process_that_is_killed_is_told_of():
    with pytest.raises(UserError, match="killed; perhaps memory ran out"):
        in_a_process(signal.raise_signal, signal.SIGKILL)
