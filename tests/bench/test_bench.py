"""Benchmarks run, and their rows hold what they promise; the figures themselves are nobody's test."""

import json
import signal
from pathlib import Path

import pytest
import torch

from recbole_ssm import bench, clock
from recbole_ssm.bench import train
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
    for row in rows:
        assert row["speedup_over_recbole"] == rows[0]["seconds_per_epoch"] / row["seconds_per_epoch"]
        assert row["dataset"] == "toy" and row["steps"] == 5
        assert row["seconds_per_epoch"] > 0 and row["peak_memory_bytes"] > 10**7 and row["timed_steps"] >= 2
    assert "speedup_over_recbole" in capsys.readouterr().out


def small_train(tmp_path, monkeypatch, *results):
    """Run ``bench train`` on toy over a file of older rows; its rows are results, or raise them."""
    (tmp_path / "rows.json").write_text("[1]")
    left = iter(results)

    def measured(*job, environment):
        result = next(left)
        if isinstance(result, BaseException):
            raise result
        return {"seconds_per_epoch": result}

    monkeypatch.setattr(train, "in_a_process", measured)
    data = f"--data_path={REPOSITORY / 'dataset'}"
    bench.main(["train", "--datasets=toy", data, "--models=Mamba4Rec", f"--json={tmp_path / 'rows.json'}"])


def test_a_row_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch, capsys):
    small_train(tmp_path, monkeypatch, UserError("the process was killed"), 4.0, RuntimeError("no\nmore"), 2.0)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row.get("note") for row in rows] == [
        "failed: the process was killed",
        None,
        "failed: RuntimeError: no",
        None,
    ]
    assert [(row["name"], row["train_mode"]) for row in rows[2:]] == [("Mamba4Rec", "prefix"), ("Mamba4Rec", "packed")]
    assert "speedup_over_recbole" not in rows[3]  # RecBole's time is not known
    assert "failed: the process was killed" in capsys.readouterr().out


def test_rows_before_an_interruption_are_kept(tmp_path, monkeypatch, capsys):
    with pytest.raises(KeyboardInterrupt):
        small_train(tmp_path, monkeypatch, 4.0, 2.0, KeyboardInterrupt())
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 2
    assert "the benchmark ended early; 2 rows were measured:\nname" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        small_train(tmp_path, monkeypatch, KeyboardInterrupt())
    assert (tmp_path / "rows.json").read_text() == "[1]"  # older rows are not written over by none


def test_a_data_set_that_cannot_be_read_is_told_before_the_first_row(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "in_a_process", None)
    with pytest.raises(UserError, match="there is no data set|toyy"):
        bench.main(["train", "--datasets=toy,toyy", f"--data_path={REPOSITORY / 'dataset'}"])


@pytest.mark.parametrize(("steps", "timed"), [([60, 40, 40, 40], [40, 40]), ([9, 8, 8, 8, 8], [8, 8, 8])])
def test_the_first_step_is_a_warm_up(monkeypatch, steps, timed):
    """Also where it alone takes longer than there is time; quick steps warm up twice."""
    now, left = [0.0], iter(steps)

    def step():
        now[0] += next(left)

    monkeypatch.setattr(clock, "now", lambda device: now[0])
    assert list(train._timed(step, 480, 20.0, torch.device("cpu"))) == timed


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
        (["train", "--datasets="], "argument --datasets: a name is missing in ''"),
        (["train", "--datasets=toy,toy"], "argument --datasets: toy stands twice"),
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
    assert bench.table([*rows, {"name": "b", "note": "failed"}]).splitlines()[0::3] == [
        "name      n       s       note",
        "b                         failed",
    ]


def test_a_process_that_is_killed_is_told_of():
    with pytest.raises(UserError, match="killed; perhaps memory ran out"):
        in_a_process(signal.raise_signal, signal.SIGKILL)
