"""bench ops and bench step, at sizes of no interest."""

import json
import re

import pytest
import torch

from recbole_ssm.bench.ops import CASES
from recbole_ssm.cli import main
from recbole_ssm.ops.backend import available_backends


def speedups_are_right(rows, column, rival, *same):
    """A speedup is the rival's time over the row's own, in each group of rows with the same values in some columns."""
    theirs = {tuple(row[key] for key in same): row["ms"] for row in rows if rival.items() <= row.items()}
    assert theirs and all(
        row[column] == pytest.approx(theirs[group] / row["ms"])
        for row in rows
        if (group := tuple(row[key] for key in same)) in theirs
    )


def test_every_op_is_measured_on_every_backend(tmp_path, capsys):
    out = tmp_path / "ops.json"
    assert main(["bench", "ops", "--lengths=3,300", "--tokens=300", "--rounds=1", f"--json={out}"]) == 0
    rows = json.loads(out.read_text())
    assert "selective_scan" in capsys.readouterr().out
    for op in CASES:
        short = {row["backend"] for row in rows if row["op"] == op and row["L"] == 3}
        long = {row["backend"] for row in rows if row["op"] == op and row["L"] == 300}
        assert set(available_backends()) <= short
        assert set(available_backends()) - {"reference"} <= long and "reference" not in long
    assert all(row["ms"] > 0 and row["floor_share"] > 0 for row in rows)
    if "native" in available_backends():
        speedups_are_right(rows, "speedup_over_native", {"backend": "native"}, "op", "L", "direction")


def test_the_loss_is_measured(tmp_path):
    out = tmp_path / "loss.json"
    assert main(["bench", "loss", "--shapes=40x8x5000,3x2x7", "--rounds=1", f"--json={out}"]) == 0
    rows = json.loads(out.read_text())
    assert {row["items"] for row in rows} == {5000, 7}
    assert {row["task"] for row in rows} == {"loss", "loss and gradients", "ranks"}
    assert {row["way"] for row in rows} >= {"pytorch", "auto", "torch"}
    speedups_are_right(rows, "speedup_over_pytorch", {"way": "pytorch"}, "items", "task")


def test_every_step_is_measured(tmp_path):
    out = tmp_path / "step.json"
    assert main(["bench", "step", "--batch_size=2", "--length=5", "--items=20", "--rounds=1", f"--json={out}"]) == 0
    rows = json.loads(out.read_text())
    assert {row["model"] for row in rows} == {"RecBole SASRec", "SASRec", "Mamba4Rec", "2Mamba4Rec", "Hydra4Rec"}
    assert {row["step"] for row in rows} == {"train", "evaluate", "one event", "in place"}
    speedups_are_right(rows, "speedup_over_sasrec", {"model": "SASRec"}, "step")
    speedups_are_right(rows, "speedup_over_recbole", {"model": "RecBole SASRec"}, "step")
    assert not torch.is_anomaly_enabled()


def test_evaluation_beside_recboles(tmp_path):
    out = tmp_path / "rows.json"
    assert main(["bench", "eval", "--shapes=200x8x3000", "--rounds=1", f"--json={out}"]) == 0
    rows = json.loads(out.read_text())
    assert [row["way"] for row in rows] == ["recbole", "ours"]
    speedups_are_right(rows, "speedup_over_recbole", {"way": "recbole"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--ops=sdd"], "--ops: 'sdd' is not one of selective_scan, .*; did you mean 'ssd'"),
        (["ops", "--lengths=x"], "--lengths: must be whole numbers with commas, got x"),
        (["ops", "--rounds=0"], "--rounds: must be at least 1, got 0"),
        (["loss", "--shapes=3x4"], "--shapes: must be rows x numbers x items, as 2048x64x3417, with commas; got 3x4"),
        (["step", "--models=SASrec"], "--models: 'SASrec' is not one of .*; did you mean 'SASRec'"),
        (["step", "--items=1"], "--items: must be at least 2, got 1"),
    ],
)
def test_impossible_options_are_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
