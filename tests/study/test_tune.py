"""Tuning: its table is its state, failures are rows, and the commands work from end to end."""

import csv
import json
import re
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest
import yaml

from recbole_ssm import compat
from recbole_ssm.cli import main
from recbole_ssm.errors import UserError
from recbole_ssm.study import tune
from recbole_ssm.study.outcome import Outcome, Run
from recbole_ssm.study.runs import Runs
from recbole_ssm.study.space import Trial, read_space, read_trials, space_of, write_trials
from recbole_ssm.study.tune import HyperTuning, _importance, kept_objective
from tests.conftest import REPOSITORY

GRID = {"choice": {"a": [1, 2, 3], "b": ["x", "y"]}}


class Objective:
    """A score that is known; ``calls`` are the values it was asked for."""

    def __init__(self, score=lambda params: params["a"] + (params["b"] == "y") / 2):
        self.score, self.calls = score, []

    def __call__(self, params, files=None):
        self.calls.append(params)
        score = self.score(params)
        return {"best_valid_score": score, "best_valid_result": {"hit@1": score}, "test_result": {"hit@1": score / 2}}


def tuned(objective, **options):
    options.setdefault("params_dict", GRID)
    tuning = HyperTuning(objective, **options)
    tuning.run()
    return tuning


def test_the_best_of_a_grid(tmp_path):
    objective = Objective()
    tuning = tuned(objective, table=tmp_path / "t.csv")
    assert len(objective.calls) == 6 and tuning.best_params == {"a": 3, "b": "y"} and tuning.best_score == 3.5
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == list("123456") and {row["status"] for row in rows} == {"done"}
    for row in rows:
        assert float(row["score"]) == int(row["a"]) + (row["b"] == "y") / 2 == 2 * float(row["test hit@1"])
    tuning.export_result(tmp_path / "r.result")
    assert "a:3, b:y\nValid result:\nhit@1 : 3.5" in (tmp_path / "r.result").read_text()


def test_lower_can_be_better_and_0_is_a_score():
    tuning = tuned(Objective(lambda params: params["a"] - 1), bigger=False)
    assert tuning.best_params["a"] == 1 and tuning.best_score == 0
    assert tuned(Objective(lambda params: 1 - params["a"])).best_score == 0


def test_early_stopping_is_asked_for_on_a_grid_and_given_in_a_random_search():
    falling = iter(range(100, 0, -1))
    objective = Objective(lambda params: next(falling))
    wide = {"choice": {"a": list(range(50))}}
    assert len(tuned(objective, params_dict=wide).trials) == 50
    falling = iter(range(100, 0, -1))
    assert len(tuned(objective, params_dict=wide, early_stop=3).trials) == 4
    falling = iter(range(100, 0, -1))
    assert len(tuned(objective, params_dict=wide, algo="random").trials) == 11
    rising = iter(range(100))
    assert len(tuned(Objective(lambda params: next(rising)), params_dict=wide, algo="random").trials) == 50


def test_a_trial_that_fails_is_a_row(tmp_path):
    def score(params):
        if params["a"] == 1:
            raise UserError("one line")
        if params["a"] == 2:
            raise ValueError("two\nlines")
        return float("nan") if params["b"] == "y" else 1.0

    tuning = tuned(Objective(score), table=tmp_path / "t.csv")
    assert tuning.best_params == {"a": 3, "b": "x"}
    errors = {(row.params["a"], row.params["b"]): row.error for row in read_trials(tmp_path / "t.csv", tuning.space)}
    assert errors[1, "x"] == "one line" and errors[2, "y"] == "ValueError: two lines"
    assert errors[3, "y"] == "the validation score is nan" and errors[3, "x"] == ""


def test_all_trials_fail():
    with pytest.raises(UserError, match="tune: all 6 trials failed; the first: ZeroDivisionError: "):
        tuned(Objective(lambda params: 1 / 0))


@pytest.mark.parametrize("algo", ["exhaustive", "random", "bayes"])
def test_what_was_stopped_goes_on(algo, tmp_path):
    """Done trials are not run again, the interrupted one comes first, and all in all it is the same search."""
    options = {"params_dict": {"quniform": {"a": [0, 40, 1]}, "choice": {"b": ["x", "y"]}}, "algo": algo}
    options |= {"max_evals": 20, "early_stop": 100}
    whole = Objective()
    tuned(whole, **options)

    def stops(params):
        if len(first.calls) == 14:
            raise KeyboardInterrupt
        return whole.score(params)

    first, second = Objective(stops), Objective()
    with pytest.raises(KeyboardInterrupt):
        tuned(first, table=tmp_path / "t.csv", **options)
    tuning = HyperTuning(second, table=tmp_path / "t.csv", **options)
    assert [trial.status for trial in tuning.trials] == ["done"] * 13 + ["running"]
    tuning.run()
    assert first.calls[:13] + second.calls == whole.calls and second.calls[0] == first.calls[13]
    tuned(never := Objective(), table=tmp_path / "t.csv", **options)
    assert never.calls == []


def test_a_failed_trial_is_tried_again(tmp_path):
    tuned(Objective(lambda params: 1 / (params["a"] - 2)), table=tmp_path / "t.csv")
    again = Objective()
    assert {trial.status for trial in tuned(again, table=tmp_path / "t.csv").trials} == {"done"}
    assert sorted(params["b"] for params in again.calls) == ["x", "y"] and {p["a"] for p in again.calls} == {2}


def test_trials_side_by_side():
    together = threading.Barrier(3, timeout=20)
    objective = Objective(lambda params: together.wait() * 0.0 + params["a"])  # passes only if three wait at once
    tuning = tuned(objective, workers=3)
    assert len(tuning.trials) == 6 and tuning.best_params["a"] == 3


def test_threads_are_told_to_stop():
    """Ctrl-C comes to the main thread alone; here it comes when the first trial has ended."""

    def score(params):
        if params != tuning.trials[0].params:
            while not tuning.stopping:
                time.sleep(0.01)
        return 1.0

    def after(trial):
        raise KeyboardInterrupt

    tuning = HyperTuning(Objective(score), params_dict=GRID, workers=2, after=after)
    with pytest.raises(KeyboardInterrupt):
        tuning.run()


def test_the_table_comes_back(tmp_path):
    spaces = space_of({"choice": {"a": [None, True, 'x, "y"', "1", [1, 2]]}, "loguniform": {"rate": [-9, 0]}})
    trials = [
        Trial(1, {"a": [1, 2], "rate": 0.1 + 0.2}, "done", 1 / 3, {"hit@1": 1e-300}, {"hit@1": 0.1}, 2.5),
        Trial(2, {"a": 'x, "y"', "rate": 1e-5}, "failed", error='say "no", please'),
        Trial(3, {"a": None, "rate": 1.0}),
    ]
    write_trials(tmp_path / "t.csv", trials, spaces)
    assert read_trials(tmp_path / "t.csv", spaces) == trials
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]
    (tmp_path / "t.csv").write_text("something,else\n1,2\n")
    with pytest.raises(UserError, match="t.csv: damaged, or not a table of these parameters"):
        read_trials(tmp_path / "t.csv", spaces)


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    tuned(Objective()).plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


TOY = ["--dataset=toy", f"--data_path={REPOSITORY / 'dataset'}", "--epochs=1", "--model=Mamba4Rec"]


def test_end_to_end(tmp_path, capsys, monkeypatch):
    """Two commands that are one: the second time nothing trains. The best file trains."""
    (tmp_path / "s.hyper").write_text("learning_rate choice [0.01, 0.0001]\n")
    (tmp_path / "fixed.yaml").write_text("hidden_size: 8\nlearning_rate: 5.0\n")  # what is tuned wins over files
    asked = [*TOY, "--params_file", "s.hyper", "--config_files=fixed.yaml", "--output_file=all.result"]
    assert main(["--tune", *asked]) == 0
    (folder,) = (tmp_path / "saved" / "study" / "tune").glob("Mamba4Rec-toy-*")
    out = capsys.readouterr().out
    assert re.search(r"trial 2 of 2: hit@1 0\.\d+ \(.*best.*\), trained in \d+ s; learning_rate=0\.", out)
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    best = max(rows, key=lambda row: float(row["score"]))
    assert yaml.safe_load((folder / "best.yaml").read_text()) == {
        "model": "Mamba4Rec", "dataset": "toy", "data_path": str(REPOSITORY / "dataset"), "hidden_size": 8,
        "epochs": 1, "learning_rate": float(best["learning_rate"]),
    }  # fmt: skip
    assert "Test result:" in (tmp_path / "all.result").read_text()
    assert json.loads(next((tmp_path / "saved/study/tune/runs").glob("*/outcome.json")).read_text())["test"]

    def never(*arguments):
        raise AssertionError("everything was done")

    monkeypatch.setattr("recbole_ssm.study.runs.Runs._train", never)
    before = (folder / "trials.csv").read_text()
    assert main(["tune", *asked]) == 0
    assert "2 are done" in capsys.readouterr().out and (folder / "trials.csv").read_text() == before
    assert main(["--config_files", str(folder / "best.yaml"), "--show_progress=False"]) == 0


def test_a_search_begins_with_the_setting_as_it_is(tmp_path, capsys, monkeypatch):
    (tmp_path / "s.hyper").write_text("learning_rate loguniform -9,-4\nhidden_size choice [8, 16]\n")
    (tmp_path / "fixed.yaml").write_text("hidden_size: 16\n")
    asked = ["tune", *TOY, "--params_file", "s.hyper", "--algo=bayes", "--max_evals=2"]

    def told(better, *more):
        """What is printed where a trial of the setting as it is has this score and all others have 0.5."""

        def objective(params, files, trial=None, progress=None):
            score = better if params == {"learning_rate": 0.01, "hidden_size": 16} else 0.5
            figures = {"hit@1": score}
            return {"best_valid_score": score, "best_valid_result": figures, "test_result": figures, "seconds": 0.0}

        monkeypatch.setattr(tune, "kept_objective", lambda *arguments: objective)
        assert main([*asked, *more]) == 0
        return capsys.readouterr().out

    alone = told(0.9)
    assert "setting as it" not in alone  # it is 64 wide, which the file does not offer
    assert "all are drawn at random, because the Bayesian part begins after 10 trials" in alone
    later = told(0.9, "--config_files=fixed.yaml", "--max_evals=3")  # the same search, which has two trials
    assert "the next trial is the setting as it is; the others are drawn at random" in later
    assert "best: trial 3, hit@1 0.9000" in later and "nothing that was tried is better than the setting" in later
    worse = told(0.4, "--config_files=fixed.yaml", "--folder=another")
    assert "best: trial 2, hit@1 0.5000" in worse and "the setting as it was: trial 1, hit@1 0.4000\n" in worse
    (tmp_path / "s.hyper").write_text("learning_rate loguniform -9,-4\nhidden_size choice [16] if learning_rate == 1\n")
    assert "setting as it" not in told(0.9, "--config_files=fixed.yaml")  # without the condition it would be 64 wide


@pytest.mark.parametrize(("name", "stays"), [("n_groups", False), ("hidden_size", True)])
def test_a_search_of_0_1_0_goes_on_unless_the_results_of_its_trials_have_changed(tmp_path, monkeypatch, name, stays):
    options = Namespace(algo="random", prune=False, folder=tmp_path)
    space = space_of({"choice": {name: [1, 2]}})

    def folder():
        runs = Runs(tmp_path / "runs", {"data_path": str(REPOSITORY / "dataset")})
        return tune._folder(options, space, Run("2Mamba4Rec", "toy"), runs)

    with monkeypatch.context() as patch:
        patch.setattr(tune, "results_of", lambda settings: "0.1.0")
        former = folder()
    assert (folder() == former) is stays


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("learning_rat choice [1]", [], "s.hyper, line 1: there is no key 'learning_rat' of Mamba4Rec; did you mean"),
        ("eval_args choice [1]", [], "line 1: eval_args cannot be tuned, because scores would mean different things"),
        ("epochs choice [1]", [], "line 1: epochs is tuned there and given as --epochs; keep one"),
        ("d_state uniform 1,2", [], "line 1: there is no end of the values of uniform"),
        ("d_state choice [8]", ["--tool=Rya"], "'Rya' is not one of Optuna, Hyperopt, Ray; did you mean 'Ray'?"),
        ("d_state choice [8]", ["--workers=0"], "--workers: must be at least 1, got 0"),
        ("d_state choice [8]", ["--algo=byes"], "algo: 'byes' is not one of exhaustive, random, bayes"),
        ("d_state choice [8]", ["--hidden_siz=8"], "hidden_siz: there is no such key; did you mean 'hidden_size'?"),
        ("d_state choice [8]", ["--display_file=x.xyz"], "x.xyz: a plot must end in .png"),
        ("d_state choice [8]", ["--output_file=no/x"], "--output_file: there is no folder"),
    ],
)
def test_mistakes_are_one_line(line, options, message, tmp_path, capsys):
    (tmp_path / "s.hyper").write_text(line + "\n")
    assert main(["tune", *TOY, "--params_file=s.hyper", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("recbole_ssm: error: ")


def test_no_space_ships(capsys):
    assert main(["tune", "--model=NARM", "--dataset=toy", f"--data_path={REPOSITORY / 'dataset'}"]) == 2
    assert "--params_file: no search space ships for NARM; name a file" in capsys.readouterr().err


def test_ray_is_optional(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "s.hyper").write_text("d_state choice [8]\n")
    assert main(["tune", *TOY, "--params_file=s.hyper", "--tool=Ray"]) == 2
    assert "--tool=Ray: Ray is not installed; run: pip install 'ray>=2.9', or take --workers" in capsys.readouterr().err


@pytest.mark.slow
def test_ray(tmp_path, capsys):
    pytest.importorskip("ray")
    (tmp_path / "s.hyper").write_text("learning_rate choice [0.01, 0.0001]\n")
    assert main(["tune", *TOY, "--params_file=s.hyper", "--tool=Ray", "--workers=2"]) == 0
    assert "trial 2 of 2" in capsys.readouterr().out


def test_recboles_own_hypertuning_takes_our_objective(toy, tmp_path):
    pytest.importorskip("hyperopt")
    compat.install()
    from recbole.trainer import HyperTuning as RecBolesHyperTuning

    from recbole_ssm.quick_start import objective_function

    fixed = {**toy["config_dict"], "model": "Mamba4Rec", "dataset": "toy", "epochs": 1, "hidden_size": 8}
    (tmp_path / "fixed.yaml").write_text(yaml.safe_dump(fixed))
    tuning = RecBolesHyperTuning(
        objective_function,
        params_dict={"choice": {"learning_rate": [0.01, 0.0001]}},
        fixed_config_file_list=["fixed.yaml"],
    )
    tuning.run()
    assert len(tuning.params2result) == 2 and tuning.best_params["learning_rate"] == 0.01


def test_recbole_is_imported_beside_a_ray_without_tune():
    code = """
import sys, types
sys.modules["ray"] = ray = types.ModuleType("ray")
from recbole_ssm import compat
compat.install()
assert sys.modules["ray"] is ray and "ray.tune" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tune_is_an_option_of_the_main_job_alone(monkeypatch):
    from recbole_ssm import cli

    seen = []
    monkeypatch.setattr(
        cli, "COMMANDS", {name: lambda rest, name=name: seen.append((name, rest)) for name in cli.COMMANDS}
    )
    assert main(["--model=SASRec", "--tune"]) == main(["compare", "--tune", "8"]) == 0
    assert seen == [("tune", ["--model=SASRec"]), ("compare", ["--tune", "8"])]


def test_runs_tell_optuna_of_their_validations_and_stop_where_it_says(tmp_path):
    """What an interrupted run had told already is not told again, and the test metrics are not told at all."""
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=0.2))

    class Stub:
        def get(self, run, progress):
            assert run.options == {"epochs": 3, "a": 1}
            for count in range(1, 5):
                progress({"epoch": 1, "epochs": 4})
                progress({"validations": scores[:count]})
            return Outcome(run, None, tmp_path, valid={"hit@1": max(scores)}, test={"hit@1": 0.0}, seconds=1.0)

        def give_up(self, run):
            given_up.append(run.options)

    given_up = []
    objective = kept_objective(Stub(), Run("SASRec", "toy", {"epochs": 3}), "hit@1")
    trial, scores = study.ask(), [0.3, 0.4, 0.5, 0.4]
    trial.report(0.3, 1)
    assert objective({"a": 1}, None, trial)["best_valid_score"] == objective({"a": 1}, None)["best_valid_score"] == 0.5
    assert study.trials[0].intermediate_values == {1: 0.3, 2: 0.4, 3: 0.5, 4: 0.4}
    trial, scores = study.ask(), [0.3, 0.1, 0.5, 0.4]
    assert given_up == []
    with pytest.raises(optuna.TrialPruned):
        objective({"a": 1}, None, trial)
    assert given_up == [{"epochs": 3, "a": 1}]
    assert study.trials[1].intermediate_values == {1: 0.3, 2: 0.1}


def test_importances_are_a_file_that_names_what_is_left_out(tmp_path):
    """A key with a condition is in some trials only, so its share of the variance cannot be compared with others."""
    (tmp_path / "s.hyper").write_text("a choice [1, 2, 3, 4]\nb choice [1, 2]\nc uniform 0,1 if a in [1, 2]\n")
    space = read_space(tmp_path / "s.hyper")
    tuning = tuned(Objective(lambda params: params["a"]), params_dict=None, space=space, algo="random", max_evals=9)
    text = _importance(tuning, tmp_path / "importance.csv", "hit@1")
    assert "; left out, because not every trial has a value: c" in text
    with open(tmp_path / "importance.csv", newline="") as file:
        rows = {row["key"]: row["importance"] for row in csv.DictReader(file)}
    assert list(rows) == ["a", "b", "c"] and float(rows["a"]) > 0.9 and rows["c"] == ""


def test_prune_needs_no_value(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("recbole_ssm.study.tune.run", lambda options, keys: seen.append((options.prune, keys)))
    assert main(["tune", *TOY, "--prune"]) == main(["tune", "--prune", "--prune=5", *TOY]) == main(["tune", *TOY]) == 0
    assert [prune for prune, _ in seen] == [3, 5, None] and all(keys["epochs"] == 1 for _, keys in seen)
