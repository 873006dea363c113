"""Trials outlive kills and are shared among processes; what a search knows and when a trial is stopped early."""

import math
import random
import subprocess
import sys
import threading
import time

import pytest

from recbole_ssm.errors import UserError
from recbole_ssm.keys import KEYS
from recbole_ssm.study.space import Search, Trial, read_space, read_trials, space_of, write_trials
from recbole_ssm.study.tune import HyperTuning
from tests.study.test_tune import GRID, Objective, tuned

optuna = pytest.importorskip("optuna")

# Arguments: the table, a log of the trials that were begun, seconds a trial, processes at a time.
SEARCH = """
import sys, time
from pathlib import Path
from recbole_ssm.study.tune import HyperTuning

def objective(params, files):
    time.sleep(float(sys.argv[3]))
    with open(sys.argv[2], "a") as file:
        file.write(f"{params['a']}\\n")
    return {"best_valid_score": params["a"], "best_valid_result": {}, "test_result": {}}

HyperTuning(objective, params_dict={"choice": {"a": list(range(40))}}, table=Path(sys.argv[1])).run()
"""
SPACE = {"choice": {"a": list(range(40))}}


def search(folder, log, seconds=0.0):
    return subprocess.Popen([sys.executable, "-c", SEARCH, str(folder / "t.csv"), str(log), str(seconds)])


def evaluated(log):
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_processes_share_the_trials_and_do_not_write_over_each_others_table(tmp_path):
    logs = [tmp_path / "one", tmp_path / "two"]
    processes = [search(tmp_path, log, 0.1) for log in logs]
    assert [process.wait() for process in processes] == [0, 0]
    first, second = map(evaluated, logs)
    assert sorted(first + second) == list(range(40)) and min(len(first), len(second)) > 3
    trials = read_trials(tmp_path / "t.csv", space_of(SPACE))
    assert len(trials) == 40 and all(trial.score == trial.params["a"] for trial in trials)
    assert [trial.number for trial in trials] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_twenty_random_kills_lose_no_finished_trial_and_repeat_none(tmp_path):
    """Two processes at a time are killed at random; what the table called done stays, and is not run again."""
    log, draw, kills = tmp_path / "log", random.Random(0), 0
    done, calls = {}, []
    while kills < 20:
        before = len(evaluated(log))
        processes = [search(tmp_path, log, 0.05), search(tmp_path, log, 0.05)]
        while len(evaluated(log)) == before and any(process.poll() is None for process in processes):
            time.sleep(0.01)
        for process in processes:
            time.sleep(draw.random() / 3)
            process.kill()
            kills += process.wait() < 0
        trials = read_trials(tmp_path / "t.csv", space_of(SPACE))
        assert {number: trial for number, trial in enumerate(trials, 1) if number in done} == done
        assert not {done[number].params["a"] for number in done} & set(evaluated(log)[len(calls) :])
        done, calls = {trial.number: trial for trial in trials if trial.status == "done"}, evaluated(log)
        if len(done) > 30:  # begin another search
            assert len({trial.params["a"] for trial in trials}) == len(trials)
            for file in tmp_path.iterdir():
                file.unlink()
            done, calls = {}, []


def test_trials_that_end_in_several_threads_are_told_one_by_one():
    told, second = [], threading.Event()

    def after(trial):
        told.append(trial.number)
        if len(told) == 2:
            second.set()
        assert len(told) > 1 or not second.wait(0.5), "two trials are told at a time"

    tuned(Objective(), workers=3, after=after)
    assert sorted(told) == [1, 2, 3, 4, 5, 6]


def test_what_a_kill_left_of_a_line_is_overwritten(tmp_path):
    table, objective = tmp_path / "t.csv", Objective()
    tuned(objective, table=table, max_evals=3)
    with open(tmp_path / "t.journal", "ab") as file:
        file.write(b'{"op_code":4,"worker_id"')
    assert [trial.status for trial in HyperTuning(objective, params_dict=GRID, table=table).trials] == ["done"] * 3
    assert len(tuned(objective, table=table).trials) == 6 == len(objective.calls)
    assert len(HyperTuning(objective, params_dict=GRID, table=table).trials) == 6


def test_a_damaged_journal_is_one_line_and_the_table_takes_its_place(tmp_path):
    table, journal = tmp_path / "t.csv", tmp_path / "t.journal"
    tuned(Objective(), table=table)
    journal.write_bytes(b"nonsense\n" + journal.read_bytes())
    with pytest.raises(UserError, match="t.journal: damaged .*; move it away, and .*t.csv takes its place"):
        HyperTuning(Objective(), params_dict=GRID, table=table)
    journal.unlink()
    tuned(never := Objective(), table=table)
    assert never.calls == []


@pytest.mark.parametrize("algo", ["exhaustive", "random", "bayes"])
def test_a_table_of_0_1_0_goes_on(algo, tmp_path):
    """Its table was all it kept: what is done there counts, and what was running or had failed is run."""
    options = {"params_dict": {"quniform": {"a": [0, 40, 1]}, "choice": {"b": ["x", "y"]}}, "algo": algo}
    options |= {"max_evals": 16, "early_stop": 100}
    trials = tuned(whole := Objective(), **options).trials
    trials[8] = Trial(9, trials[8].params, "failed", error="no memory")
    trials[11] = Trial(12, trials[11].params)
    write_trials(tmp_path / "t.csv", trials[:12], space_of(options["params_dict"]))
    tuning = tuned(again := Objective(), table=tmp_path / "t.csv", **options)
    assert again.calls[:2] == [whole.calls[8], whole.calls[11]] and len(again.calls) == 2 + 4
    assert len(tuning.trials) == 16 and {trial.status for trial in tuning.trials} == {"done"}
    if algo != "bayes":  # whose later proposals come from the scores, of which one was missing for a while
        assert again.calls[2:] == whole.calls[12:]


def test_a_key_may_be_called_as_a_column_of_the_table_is(tmp_path):
    space = space_of({"choice": {"score": ["dot", "cosine"], "seconds": [1, 2]}})
    trials = [Trial(1, {"score": "dot", "seconds": 2}, "done", 0.25, {"hit@1": 0.25}, {"hit@1": 0.5}, 3.0, "")]
    write_trials(tmp_path / "t.csv", trials, space)
    assert "1,done,0.25,dot,2,0.25,0.5,3.0," in (tmp_path / "t.csv").read_text()
    assert read_trials(tmp_path / "t.csv", space) == trials


@pytest.mark.parametrize("algo", ["bayes", "random"])
def test_no_test_metric_reaches_the_search(algo):
    def objective(params, files, factor=1.0):
        score = -((params["a"] - 7) ** 2)
        return {"best_valid_score": score, "best_valid_result": {}, "test_result": {"hit@1": factor * score}}

    options = {"params_dict": {"uniform": {"a": [0, 10]}}, "algo": algo, "max_evals": 15}
    one, other = (
        tuned(lambda *given, factor=factor: objective(*given, factor=factor), **options) for factor in (1.0, -5.0)
    )
    assert one.params_list == other.params_list and one.best_params == other.best_params
    assert [trial.test for trial in one.trials] != [trial.test for trial in other.trials]


def test_a_trial_behind_the_median_is_stopped(tmp_path):
    """The curves rise, so only a comparison at the same step tells the bad ones."""
    seen = {}

    def objective(params, files, trial):
        seen[params["a"]] = 0
        for step in range(1, 7):
            seen[params["a"]] = step
            trial.report(params["a"] * step, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return {"best_valid_score": 6 * params["a"], "best_valid_result": {}, "test_result": {}}

    space = {"choice": {"a": list(range(1, 31))}}
    tuning = tuned(objective, params_dict=space, prune=3, table=tmp_path / "t.csv")
    pruned = [trial for trial in tuning.trials if trial.status == "pruned"]
    assert len(tuning.trials) == 30 and 5 < len(pruned) < 20 and tuning.best_params == {"a": 30}
    for trial in pruned:
        assert seen[trial.params["a"]] == 3 and trial.score == 3 * trial.params["a"]
    assert read_trials(tmp_path / "t.csv", space_of(space)) == tuning.trials
    tuned(never := Objective(), params_dict=space, prune=3, table=tmp_path / "t.csv")
    assert never.calls == [], "a pruned trial is not tried again"


CONDITIONAL = (
    "loss choice ['CE', 'gBCE', 'BPR']\nt uniform 0,1 if loss == 'gBCE'\nn choice [1, 2] if loss in ['gBCE', 'CE']\n"
)


def test_conditions(tmp_path):
    (tmp_path / "s.hyper").write_text(CONDITIONAL.replace("uniform 0,1", "quniform 0,1,0.5"))
    space = read_space(tmp_path / "s.hyper")
    tuning = tuned(lambda params, files: {"best_valid_score": len(params), "best_valid_result": {}, "test_result": {}},
                   params_dict=None, space=space, table=tmp_path / "t.csv")  # fmt: skip
    found = [trial.params for trial in tuning.trials]
    assert len(found) == 2 + 3 * 2 + 1 == Search("exhaustive", space, 0).size, "each point once"
    assert len({str(sorted(params.items())) for params in found}) == 9
    assert {tuple(params) for params in found} == {("loss", "n"), ("loss", "t", "n"), ("loss",)}
    assert read_trials(tmp_path / "t.csv", space) == tuning.trials
    (tmp_path / "s.hyper").write_text(CONDITIONAL)
    space = read_space(tmp_path / "s.hyper")
    for algo in ("random", "bayes"):
        trials = tuned(lambda params, files: {"best_valid_score": params.get("t", 0), "best_valid_result": {},
                       "test_result": {}}, params_dict=None, space=space, algo=algo, max_evals=25,
                       early_stop=99).trials  # fmt: skip
        assert {("t" in t.params) == (t.params["loss"] == "gBCE") for t in trials} == {True}
        assert {("n" in t.params) == (t.params["loss"] != "BPR") for t in trials} == {True} and len(trials) > 20


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("losss == 'CE'", "line 2: the condition's 'losss' must be tuned on an earlier line; did you mean 'loss'"),
        ("loss == 'BCE'", "line 2: the condition must name values of loss, such as CE and gBCE"),
        ("loss in 'CE'", "line 2: the condition must name values of loss"),
        ("loss = 'CE'", "line 2: choice needs a list of literals"),
    ],
)
def test_faults_of_conditions(condition, message, tmp_path):
    (tmp_path / "s.hyper").write_text(f"loss choice ['CE', 'gBCE']\nn choice [1, 2] if {condition}\n")
    with pytest.raises(UserError, match=message):
        read_space(tmp_path / "s.hyper")


def test_values_from_the_table_of_keys(tmp_path):
    lines = "learning_rate\ndropout_prob\nloss_type choice ['CE', 'gBCE']\ngbce_t if loss_type == 'gBCE'\nd_state\n"
    (tmp_path / "s.hyper").write_text(lines)
    space = read_space(tmp_path / "s.hyper")
    low, high, log = KEYS["learning_rate"].tune
    assert log and 0 < low < high
    assert space["learning_rate"].values == (math.log(low), math.log(high))
    assert space["dropout_prob"].kind == "uniform" and space["dropout_prob"].values == KEYS["dropout_prob"].tune[:2]
    assert space["gbce_t"].condition == ("loss_type", ["gBCE"])
    assert space["d_state"].grid() == list(KEYS["d_state"].tune)
    (tmp_path / "s.hyper").write_text("epochs\n")
    with pytest.raises(UserError, match="line 1: must be 'name type values', such as .*, got 'epochs'"):
        read_space(tmp_path / "s.hyper")


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.tune])
def test_every_range_in_the_table_of_keys_can_be_searched(name, tmp_path):
    (tmp_path / "s.hyper").write_text(f"{name}\n")
    space = read_space(tmp_path / "s.hyper")
    params = [tuned(Objective(lambda params: 1.0), params_dict=None, space=space, algo=algo, max_evals=3).trials
              for algo in ("random", "bayes")]  # fmt: skip
    for trial in params[0] + params[1]:
        KEYS[name].take(name, trial.params[name])


def test_a_choice_may_hold_what_looks_like_a_condition(tmp_path):
    (tmp_path / "s.hyper").write_text("a choice ['x if y == 1']\n")
    assert read_space(tmp_path / "s.hyper")["a"].grid() == ["x if y == 1"]


def test_recboles_attributes(tmp_path):
    pytest.importorskip("matplotlib")
    tuning = HyperTuning(Objective(), None, None, GRID, None, str(tmp_path / "p.png"), "exhaustive", 100, 10)
    assert (tuning.best_params, tuning.best_score, tuning.params2result) == (None, None, {})
    tuning.run()
    assert tuning.best_test_result == {"hit@1": 1.75} and tuning.score_list[0] == tuning.trials[0].score
    assert tuning.params2result["a:3, b:y"]["test_result"] == {"hit@1": 1.75} and len(tuning.params_list) == 6
    assert (tmp_path / "p.png").is_file()


@pytest.mark.parametrize("algo", ["exhaustive", "random", "bayes"])
def test_as_recbole_tests_its_own(algo, toy, tmp_path):
    """RecBole's three tests of HyperTuning, with this objective, on one of its general-purpose spaces."""
    from recbole_ssm.quick_start import objective_function

    (tmp_path / "space.test").write_text("learning_rate loguniform -8,0\nhidden_size choice [8,16]\n")
    (tmp_path / "fixed.yaml").write_text(
        f"model: GRU4Rec\ndataset: toy\nepochs: 1\nstate: ERROR\ndata_path: {toy['config_dict']['data_path']}\n"
        f"checkpoint_dir: {tmp_path}\nshow_progress: False\n"
    )
    options = {"params_file": str(tmp_path / "space.test"), "fixed_config_file_list": [str(tmp_path / "fixed.yaml")]}
    if algo == "exhaustive":
        options |= {"params_file": None, "params_dict": {"choice": {"learning_rate": [0.001, 0.01]}}}
    tuning = HyperTuning(objective_function, algo=algo, early_stop=10, max_evals=4, **options)
    tuning.run()
    tuning.export_result(output_file=str(tmp_path / "all.result"))
    count = 2 if algo == "exhaustive" else 4
    assert len(tuning.params2result) == count and 0 <= tuning.best_score <= 1
    assert (tmp_path / "all.result").read_text().count("Test result:") == count


def test_a_missing_optuna_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="tuning needs Optuna, which the extra 'tune' brings; run: pip install 'optuna"):
        HyperTuning(Objective(), params_dict=GRID)
