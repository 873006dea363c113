"""The benchmarks of the optimisers run from the command line and write what they print."""

import json

import pytest

from recbole_ssm import bench
from recbole_ssm.bench import optim as bench_optim
from recbole_ssm.errors import UserError
from recbole_ssm.optim import USFGM


def rows_of(arguments, tmp_path):
    bench.main([*arguments, f"--json={tmp_path / 'rows.json'}"])
    return json.loads((tmp_path / "rows.json").read_text())


def test_the_cost_of_a_step(tmp_path, capsys):
    small = ["--items=50", "--batch_size=8", "--length=4", "--rounds=1", "--every=10"]
    rows = {row["what"]: row for row in rows_of(["optim", *small], tmp_path)}
    assert {"update: USGM", "update: Adam", "measured step", "measuring 1 step in 10, a step"} <= set(rows)
    assert all(row["ms"] > 0 for name, row in rows.items() if not name.startswith("measuring"))
    assert "update: USGM" in capsys.readouterr().out


def test_both_halves_of_an_iteration_of_usfgm_are_timed(monkeypatch, tmp_path):
    def medians(work, rounds, device):
        work["step"]()
        halves, half = [], USFGM.collect
        monkeypatch.setattr(USFGM, "collect", lambda self, compare: halves.append(1) or half(self, compare))
        work["update: USFGM"]()
        assert len(halves) == 2
        return dict.fromkeys(work, 1.0)

    monkeypatch.setattr(bench_optim, "medians", medians)
    rows = {row["what"]: row for row in rows_of(["optim", "--items=50", "--batch_size=8", "--length=4"], tmp_path)}
    assert rows["update: USFGM"]["% of a step"] == 50


def test_the_order_of_convergence(tmp_path):
    rows = rows_of(["convex", "--gradients=64", "--size=3", "--seeds=1"], tmp_path)
    assert len(rows) == 24
    assert {row["method"] for row in rows} == {"USGM", "USFGM"}
    assert all(0 < row["gap / bound, at most"] < 3 for row in rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["optim", "--chunks=1"], "--chunks: must be at least 2, got 1"),
        (["optim", "--device=gpu"], "--device: 'gpu'"),
        (["convex", "--gradients=5"], "--gradients: must be at least 32, got 5"),
        (["optm"], "did you mean 'optim'"),
    ],
)
def test_bad_options_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        bench.main(arguments)
