"""The latency lab: exponents and forecasts from made-up times, the formats, and a run at sizes of no interest."""

import csv
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm import clock
from recbole_ssm.bench import latency
from recbole_ssm.bench.latency import Forecast, exponents
from recbole_ssm.cli import main
from recbole_ssm.model import NEURAL_BASELINES, STATE_SPACE


def made(seconds, lengths=(50, 200, 1000, 4000), model="M", **more):
    """Rows as they would be measured, with ``seconds(length)`` of encoding."""
    row = {"model": model, "path": "history", "batch_size": 1, "items": 10, **more}
    return [{**row, "length": n, "encode_s": seconds(n)} for n in lengths]


@given(st.floats(0.01, 3), st.floats(1e-9, 1))
def test_the_exponent_of_a_power_is_found_without_error(power, factor):
    (fit,) = exponents(made(lambda n: factor * n**power))
    assert fit["exponent"] == pytest.approx(power, abs=1e-9) and fit["last"] == pytest.approx(power, abs=1e-9)
    assert fit["standard_error"] == pytest.approx(0, abs=1e-6)
    assert fit["lengths"] == 4


def test_noise_gives_the_standard_error_of_least_squares():
    """Against the textbook's formula, s / sqrt(sum of squared deviations) with n - 2 degrees of freedom."""
    rng = np.random.default_rng(0)
    lengths = [2**k for k in range(4, 15)]
    noise = dict(zip(lengths, rng.normal(0, 0.2, len(lengths))))
    (fit,) = exponents(made(lambda n: n**2 * np.exp(noise[n]), lengths))
    x, y = np.log(lengths), np.array([2 * np.log(n) + noise[n] for n in lengths])
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    error = np.sqrt(residual @ residual / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    assert fit["standard_error"] == pytest.approx(error)
    assert abs(fit["exponent"] - 2) < 3 * error


def test_a_constant_cost_shows_in_the_last_slope():
    (fit,) = exponents(made(lambda n: 1e-3 + 1e-9 * n**2, (10, 100, 1000, 100_000)))
    assert fit["exponent"] < 1.5 < fit["last"] < 2


def test_each_model_batch_and_catalogue_is_fitted_alone():
    rows = made(lambda n: n, model="A") + made(lambda n: n**2, model="B") + made(lambda n: n**1.5, batch_size=64)
    rows += made(lambda n: 1.0, (50,), model="one length")
    rows += made(lambda n: None, model="skipped") + made(lambda n: n**9, path="one event")
    found = {(fit["model"], fit["batch_size"]): round(fit["exponent"], 6) for fit in exponents(rows)}
    assert found == {("A", 1): 1, ("B", 1): 2, ("M", 64): 1.5}


def test_two_lengths_have_no_error():
    (fit,) = exponents(made(lambda n: n, (10, 20)))
    assert fit["standard_error"] is None and fit["exponent"] == pytest.approx(1)


def test_forecasts():
    cost = Forecast()
    assert cost.of(64, 1000) == np.inf
    cost.note(1, 100, 1.0)
    assert cost.of(64, 1000) == pytest.approx(640)  # in proportion, where nothing else is known
    cost.note(1, 1000, 100.0)
    assert cost.of(1, 4000) == pytest.approx(1600)  # quadratic as the two before
    assert cost.of(2, 100) == pytest.approx(2)
    cost.note(1, 4000, 100.0)
    assert cost.of(1, 8000) == pytest.approx(200)  # at least in proportion
    cost.note(64, 100, 10.0)
    assert cost.of(128, 200) == pytest.approx(40)  # from the nearest batch


def run(tmp_path, *options):
    files = [f"--json={tmp_path / 'rows.json'}", f"--csv={tmp_path / 'rows.csv'}"]
    assert main(["bench", "latency", *options, *files]) == 0
    return json.loads((tmp_path / "rows.json").read_text())


def test_end_to_end(tmp_path, capsys, monkeypatch):
    """The clock goes on by a millisecond whenever it is read, so that a busy machine changes nothing."""
    pytest.importorskip("matplotlib")
    milliseconds = itertools.count()
    monkeypatch.setattr(clock, "now", lambda device="cpu": next(milliseconds) / 1000)
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=clock.now))
    sizes = ["--lengths=3,40", "--batch_sizes=2,1", "--items=20", "--seconds=0.5", f"--plot={tmp_path / 'l.svg'}"]
    rows = run(tmp_path, *sizes)
    out = capsys.readouterr().out
    assert "weights are random" in out and "exponent" in out and "standard_error" in out
    carried = [row["model"] for row in rows if row["path"] == "one event"]
    assert carried == ["Mamba4Rec", "2Mamba4Rec"] * 2
    histories = {(row["model"], row["length"], row["batch_size"]) for row in rows if row["path"] == "history"}
    assert histories == set(itertools.product([*STATE_SPACE, *NEURAL_BASELINES], (3, 40), (1, 2)))
    for row in rows:
        assert row["note"] is None and row["items"] == 20 and row["calls"] >= 3
        assert [row[f"p{q}_s"] for q in (50, 95)] == pytest.approx([0.004] * 2)
        assert 20 <= row["calls"] < 100 and row["p99_s"] is None  # no call is beyond it
        assert [row[f"{part}_s"] for part in ("encode", "score", "topk")] == pytest.approx([0.001, 0.002, 0.001])
    with open(tmp_path / "rows.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [list(row) for row in table] == [list(row) for row in rows]
    assert [float(row["p50_s"]) for row in table] == [row["p50_s"] for row in rows]
    assert "<svg" in (tmp_path / "l.svg").read_text()


def test_the_legend_names_what_any_panel_shows(tmp_path, monkeypatch):
    named = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "legend", lambda self, handles, labels, **options: named.append(list(labels)))
    rows = made(lambda n: n, model="A") + made(lambda n: n, model="B") + made(lambda n: n, model="B", batch_size=64)
    latency._draw(tmp_path / "l.svg", [{**row, "p50_s": row["encode_s"]} for row in rows])
    assert named == [["A", "B"]]


def test_what_would_not_fit_is_a_row_that_says_so(tmp_path, monkeypatch):
    sizes = ["--models=SASRec,FPMC", "--lengths=5,500", "--batch_sizes=2000", "--items=30"]
    rows = run(tmp_path, *sizes, "--seconds=0.02", "--clock=processor")
    assert [(row["model"], row["length"]) for row in rows] == [(m, n) for n in (5, 500) for m in ("SASRec", "FPMC")]
    assert "skipped: a call takes about" in rows[2]["note"] and rows[2]["p50_s"] is None
    assert rows[1]["note"].startswith("failed: ")  # it wants users
    monkeypatch.setattr(latency, "_free_bytes", lambda device: 1_000_000)
    rows = run(tmp_path, *sizes)
    assert "GB, and 0.0 GB are free" in rows[0]["note"]


def test_a_step_gives_what_the_whole_history_gives():
    """The two paths that the table compares compute the same scores."""
    import torch

    from recbole_ssm.bench.latency import _build, _OneEvent

    for name in ("Mamba4Rec", "2Mamba4Rec"):
        model = _build(name, 10, 20, torch.device("cpu"))
        history = torch.randint(1, 21, (2, 10))
        serving = _OneEvent(model, 2)
        with torch.inference_mode():
            for item_B in history.T:
                scores = serving.full_sort_predict({"item_id": item_B})
            whole = model.full_sort_predict({"item_id_list": history, "item_length": torch.tensor([10, 10])})
        torch.testing.assert_close(scores, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models=SASrec"], "--models: 'SASrec' is not one of"),
        (["--lengths=long"], "--lengths: must be whole numbers with commas, got long"),
        (["--batch_sizes=0"], "--batch_sizes: must be at least 1, got 0"),
        (["--device=gpu"], "--device: 'gpu' cannot be used"),
        (["--clock=sun"], "--clock: 'sun' is not one of wall, processor"),
        (["--plot=nosuch/x.png"], "--plot: there is no folder"),
        (["--plot=x.xyz"], "x.xyz: a plot must end in .png, .svg or .pdf"),
        (["--csv=nosuch/x.csv"], "--csv: there is no folder"),
    ],
)
def test_mistakes_are_one_line(options, message, capsys):
    assert main(["bench", "latency", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
