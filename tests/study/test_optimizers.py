"""The study of optimisers: tuned with one budget, run over seeds, and told without rounding a loss into a win."""

import csv
from pathlib import Path

import numpy as np
import pytest

from recbole_ssm import study as studies
from recbole_ssm.errors import UserError
from recbole_ssm.optim import LEARNERS
from recbole_ssm.study import optimizers
from recbole_ssm.study.optimizers import OPTIMIZERS, Cell, turns
from recbole_ssm.study.outcome import Outcome, Run
from tests.conftest import REPOSITORY

# of the first four values that are tried
QUALITY = {0.0003: 0.1, 0.001: 0.3, 0.003: 0.2, 0.01: 0.1, 10.0: 0.1, 25.0: 0.2, 50.0: 0.25, 100.0: None}


class Ranked(Outcome):
    """Its validation score is also the share of 100 users whose target has rank 3; the others' have rank 11."""

    def ranks(self, order=None):
        hits = round(100 * self.valid["ndcg@20"])
        return np.arange(100).astype(str), np.where(np.arange(100) < hits, 3.0, 11.0)


def outcome(run, scores, sizes=None, error=None):
    if error:
        return Outcome(run, error, Path())
    history = [
        {"epoch": k + 1, "valid": score, "targets": 100 * (k + 1), "seconds": 2.0 * (k + 1), "steps": 10 * (k + 1)}
        | {"batch_size": (sizes or [16] * len(scores))[k], "step_size": 0.1}
        for k, score in enumerate(scores)
    ]
    last = {"ndcg@20": scores[-1]}
    return Ranked(run, None, Path(), last, last, history=history, seconds=9.0, epochs=len(scores))


class Standin:
    """Runs whose validation rises by a fixed law of the tuned number and the seed."""

    def __init__(self):
        self.asked = []

    def all(self, runs):
        for run in runs:
            self.asked.append(run)
            options = run.options
            value = (options.get("learner_args") or {}).get("D", options.get("learning_rate"))
            best = QUALITY[value]
            seed = (options["seed"] - 2020) / 100
            sizes = [16, 64, 32] if "adaptive_batch" in options else None
            yield outcome(run, [best / 4, best / 2, best + seed], sizes) if best else outcome(run, [], error="nan")


def parsed(*arguments, folder="out"):
    from recbole_ssm.errors import ArgumentParser

    parser = ArgumentParser("study optimizers", "")
    parser.add_argument("--folder", type=Path, default=Path(folder))
    optimizers.add_arguments(parser)
    return parser.parse_args(list(arguments))


@pytest.fixture
def studied():
    options = parsed("--models=2Mamba4Rec,SASRec", "--optimizers=adam,usgm-adaptive", "--seeds=3")
    _, cells, seeds = optimizers.plan(options, {"epochs": 3, "SASRec.n_layers": 1})
    runs, written = Standin(), []
    optimizers.study(runs, cells, seeds, 4, lambda: written.append(len(runs.asked)))
    return runs, cells, seeds, written


def test_every_value_once_and_the_best_on_all_seeds(studied):
    runs, cells, seeds, written = studied
    assert seeds == [2020, 2021, 2022]
    assert written == list(range(1, 4 * 4 + 4 * 3 + 1)), "the tables are written after each run"
    assert [cell.value for cell in cells] == [0.001, 50.0, 0.001, 50.0], "what failed is never chosen"
    tuning, final = runs.asked[:16], runs.asked[16:]
    assert {run.options["seed"] for run in tuning} == {2020}
    assert [run.options["seed"] for run in final] == [2020] * 4 + [2021] * 4 + [2022] * 4, "balanced at any moment"
    assert all(run in tuning for run in final[:4]), "the tuning run of the chosen value is not trained again"
    assert all(run.options["epochs"] == 3 for run in runs.asked)
    assert {run.options.get("n_layers") for run in runs.asked if run.model == "SASRec"} == {1}
    usgm = final[1].options
    assert (usgm["learner"], usgm["learner_args"]["D"], usgm["adaptive_batch"]) == ("usgm", 50.0, "hoelder")


def test_the_figures(studied):
    _, cells, _, _ = studied
    adam, usgm, *_ = optimizers.rows(cells)
    assert adam["valid"] == pytest.approx(0.31) and adam["valid_sd"] == pytest.approx(0.01)
    assert adam["ndcg@10"] == pytest.approx(0.155) and adam["hit@10"] == pytest.approx(0.31)
    # the target is the mean of Adam's best, .31: two of its own seeds get there, in the third epoch
    assert (adam["reached"], adam["targets_seen"], adam["seconds"]) == (2, 300, 6.0)
    assert usgm["target"] == pytest.approx(0.31)
    assert (usgm["reached"], usgm["targets_seen"], usgm["seconds"]) == (0, None, None)
    assert (usgm["batch_size_path"], usgm["batch_size_end_most"], usgm["batch_size_turns"]) == ("16 64 32", 32, 1)
    assert adam["at_edge"] is False and usgm["at_edge"] is False and usgm["error"] == "nan"
    text = optimizers.markdown([adam, usgm])
    assert (
        "| 2 of 3 | 300 |" in text and "| 0 of 3 |  |" in text and "16 64 32 (first seed; all end at 32 to 32" in text
    )
    assert ".1550 ± .0050" in text and "usgm-adaptive: nan" in text


def test_a_loss_of_ten_is_printed_as_ten(studied):
    (row, *_) = optimizers.rows(studied[1])
    assert "| 10.5000 ± .0100 |" in optimizers.markdown([{**row, "valid": 10.5}])


def test_scores_of_which_less_is_better():
    cell = Cell(Run("SASRec", "toy"), "adam", bigger=False)
    cell.tuning = {value: outcome(cell.run(value, 1), [0.5, score]) for value, score in ((0.1, 0.3), (0.2, 0.2))}
    cell.choose()
    assert cell.value == 0.2
    cell.outcomes = [cell.tuning[0.2]]
    assert [entry["epoch"] for entry in cell.reached(-0.5)] == [1]
    (row,) = optimizers.rows([cell])
    assert row["valid"] == row["target"] == 0.2 and row["reached"] == 1


def test_where_every_value_fails_the_row_says_why(tmp_path):
    cells = [Cell(Run("SASRec", "toy"), "sgd", bigger=True)]
    standin = Standin()
    standin.all = lambda runs: (outcome(run, [], error="loss is nan") for run in runs)
    optimizers.study(standin, cells, [1], 2, lambda: None)
    assert cells[0].value is None and not cells[0].outcomes
    text = optimizers.write_tables(tmp_path, cells, [1], 2)
    assert "| SASRec | sgd |  | 0 |" in text and "sgd: loss is nan" in text


def test_turns_count_changes_of_direction():
    for sizes, expected in (([8, 8, 8], 0), ([8, 16, 16, 32], 0), ([8, 16, 8, 8, 16], 2), ([32, 16, 32], 1)):
        assert turns(outcome(None, [0.1] * len(sizes), sizes)) == expected


def test_one_budget_for_all_and_options_that_exist():
    assert {len(method.values) for method in OPTIMIZERS.values()} == {5}
    for method in OPTIMIZERS.values():
        for value in method.values:
            options = method.options(value)
            assert options["learner"] in LEARNERS
            groups = options.get("learner_groups", {}).values()
            diameters = [group["D"] for group in (*groups, options.get("learner_args", {})) if "D" in group]
            assert value in (*diameters, options.get("learning_rate"))


def test_from_the_command_line_on_the_toy_data(tmp_path, monkeypatch, capsys):
    """Really trained; the second call trains nothing, and tells the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["optimizers", f"--folder={tmp_path / 'out'}", "--models=2Mamba4Rec", "--datasets=toy", "--seeds=1"]
    command += ["--optimizers=adam,usgm-adaptive", "--values=1", "--epochs=2", f"--data_path={REPOSITORY / 'dataset'}"]
    studies.main(command)
    said = capsys.readouterr().out
    folder = tmp_path / "out"
    assert {"optimizers.md", "optimizers.csv", "tuning.csv", "history.csv"} <= {path.name for path in folder.iterdir()}
    with open(folder / "optimizers.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["optimizer"] for row in table] == ["adam", "usgm-adaptive"]
    assert all(row["seeds"] == "1" and 0 <= float(row["ndcg@10"]) <= 1 for row in table)
    with open(folder / "history.csv", encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    assert [(row["seed"], row["epoch"], row["targets"]) for row in history[:2]] == [
        ("2020", "1", "537"),
        ("2020", "2", "1074"),
    ]
    pytest.importorskip("matplotlib")
    assert (folder / "2Mamba4Rec-toy.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/outcome.json")}
    studies.main(command)
    assert capsys.readouterr().out == said
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/outcome.json")} and len(before) == 2


@pytest.mark.parametrize(
    ("arguments", "keys", "message"),
    [
        (["--optimizers=adamm"], {}, "--optimizers: there is no 'adamm'; did you mean 'adam'"),
        (["--optimizers=adam,adam"], {}, "--optimizers: adam stands twice"),
        (["--models=SASRek"], {}, "did you mean 'SASRec'"),
        (["--seeds=0"], {}, "--seeds: must be at least 1, got 0"),
        (["--values=9"], {}, "--values: from 1 to 5"),
        ([], {"learning_rate": 1}, "--learning_rate: that is what this study varies"),
        ([], {"SASRec.learner": "adam"}, "--learner: that is what this study varies"),
        ([], {"epoch": 3}, "epoch: there is no such key; did you mean 'epochs'"),
        ([], {"eval_args": {"split": {"LS": "valid_only"}}}, "eval_args: split: .* leaves no rows to test"),
        ([], {"eval_args": {"split": {"LS": "test_only"}}}, "eval_args: split: .* leaves no rows for validation"),
        ([], {"eval_args": {"mode": {"test": "uni100"}}}, "eval_args: models are compared by ranks among all items"),
    ],
)
def test_mistakes(arguments, keys, message):
    with pytest.raises(UserError, match=message):
        optimizers.plan(parsed(*arguments), keys)
