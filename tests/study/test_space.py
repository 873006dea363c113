"""Parameter files are read and refused line by line; searches are repeatable and reach what they should."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm.arguments import PROPERTIES
from recbole_ssm.errors import UserError
from recbole_ssm.model import model_names
from recbole_ssm.quick_start import configure
from recbole_ssm.study.space import Search, Trial, cell, read_space, space_of

SHIPPED = ["2Mamba4Rec", "BERT4Rec", "GPT4Rec", "GRU4Rec", "Hydra4Rec", "LlamaRec", "Mamba4Rec", "SASRec"]


def space(tmp_path, text):
    (tmp_path / "s.hyper").write_text(text)
    return read_space(tmp_path / "s.hyper")


def test_every_type_is_read(tmp_path):
    found = space(
        tmp_path,
        "# a comment\n\nlearning_rate loguniform -8, -4\ndropout_prob uniform 0.0,0.5\n"
        "  num_layers   quniform 1,4,1\nloss_type choice ['CE', 'gBCE']\nd_state choice [16,32] # a remark\n",
    )
    assert list(found) == ["learning_rate", "dropout_prob", "num_layers", "loss_type", "d_state"]
    assert found["num_layers"].grid() == [1, 2, 3, 4] and all(type(v) is int for v in found["num_layers"].grid())
    assert found["loss_type"].grid() == ["CE", "gBCE"] and found["d_state"].grid() == [16, 32]
    assert found["learning_rate"].grid() is found["dropout_prob"].grid() is None
    assert found["d_state"].where == f"{tmp_path / 's.hyper'}, line 7"


def test_steps_of_a_fraction(tmp_path):
    assert space(tmp_path, "x quniform 0,0.5,0.1")["x"].grid() == [0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_recboles_dict():
    found = space_of({"choice": {"a": [1, 2]}, "quniform": {"b": [0, 4, 2]}})
    assert found["a"].grid() == [1, 2] and found["b"].grid() == [0, 2, 4]
    with pytest.raises(UserError, match="params_dict, a: there is no type 'chioce'; did you mean 'choice'"):
        space_of({"chioce": {"a": [1]}})


def test_nothing_is_evaluated(tmp_path):
    went_off = tmp_path / "went-off"
    with pytest.raises(UserError, match="s.hyper, line 1: choice needs a list of literals"):
        space(tmp_path, f"x choice [__import__('pathlib').Path({str(went_off)!r}).touch()]")
    assert not went_off.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x choice", "line 1: must be 'name type values', such as 'dropout_prob choice [0.1, 0.2]', got 'x choice'"),
        ("\nx unifrom 0,1", "line 2: there is no type 'unifrom'; did you mean 'uniform'?"),
        ("x choice 0.1", "choice needs a list of literals such as [0.1, 0.2] or ['CE', 'BPR']"),
        ("x choice []", "choice needs a list"),
        ("x choice [1j]", "choice needs a list of literals"),
        ("x uniform 0", "uniform needs 2 numbers as low,high, got [0]"),
        ("x uniform 0,one", "uniform needs 2 numbers"),
        ("x uniform 1,0", "uniform needs low < high, got [1, 0]"),
        ("x uniform 0,1e999", "uniform needs 2 numbers"),
        ("x quniform 0,1,0", "quniform needs low < high and a step above 0"),
        (
            "x loguniform 0.0001,0.01",
            "are natural logarithms, got [0.0001, 0.01]; for 0.0001 to 0.01 write -9.21,-4.605",
        ),
        ("x loguniform 0,800", "the bounds of loguniform are natural logarithms"),
        ("x choice [1]\ny choice [1]\nx choice [2]", "line 3: x stands on line 1 already; keep one"),
        ("# nothing\n", "there is nothing to tune in it"),
    ],
)
def test_faults_name_file_and_line(text, message, tmp_path):
    with pytest.raises(UserError) as caught:
        space(tmp_path, text)
    assert message in str(caught.value) and "s.hyper" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_file():
    with pytest.raises(UserError, match="params_file absent.hyper: No such file"):
        read_space(Path("absent.hyper"))


@pytest.mark.parametrize("model", SHIPPED)
def test_shipped_spaces(model):
    """Every model is tuned with the same number of points, all of them keys that it has."""
    found = read_space(Path("properties") / "hyper" / f"{model}.hyper")  # named as from the repository, anywhere
    assert Search("exhaustive", found, 0).size == 36
    if model not in model_names():
        pytest.skip(f"there is no {model} yet")
    config = configure(model, "toy")
    assert set(found) <= config.known_keys()
    for name, parameter in found.items():
        for value in parameter.grid():
            configure(model, "toy", config_dict={name: value})


def test_every_file_is_tested():
    assert sorted(file.stem for file in (PROPERTIES / "hyper").iterdir()) == SHIPPED


MIXED = {
    "choice": {"a": ["x", "y", 3], "flag": [True, False, None]},
    "quniform": {"n": [2, 8, 2], "q": [0.1, 0.4, 0.1]},
    "uniform": {"u": [-1, 1]},
    "loguniform": {"rate": [-8, -4]},
}


@given(st.integers(0, 2**32))
def test_samples_keep_to_their_bounds_and_come_back_from_a_table(seed):
    rng = np.random.default_rng(seed)
    for parameter in space_of(MIXED).values():
        value = parameter.sample(rng)
        if parameter.grid() is not None:
            assert value in parameter.grid()
        else:
            low, high = map(math.exp, parameter.values) if parameter.kind == "loguniform" else parameter.values
            assert low <= value <= high
        back = parameter.from_cell(cell(value))
        assert back == value and type(back) is type(value)


def test_optuna_knows_values_by_the_same_numbers():
    """What Optuna draws is what we read from it, and what we tell it back."""
    optuna = pytest.importorskip("optuna")
    spaces = space_of(MIXED)
    search, study = Search("random", spaces, 0), optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for name, parameter in spaces.items():
        for _ in range(20):
            drawn = study.ask({name: parameter.distribution()}).params[name]
            value = parameter.from_optuna(drawn)
            told = search.frozen(Trial(1, {name: value})).params[name]
            assert told == drawn if parameter.kind == "choice" else told == pytest.approx(drawn)
            if parameter.grid() is not None:
                assert value in parameter.grid()


def proposals(algo, spaces, count, score=lambda params: 0.0, seed=1):
    search, trials = Search(algo, spaces, seed), []
    for number in range(count):
        params = search.propose(trials, True)
        if params is None:
            break
        trials.append(Trial(number + 1, params, "done", score(params)))
    return [trial.params for trial in trials]


def test_an_exhaustive_search_visits_every_point_once():
    spaces = space_of({"choice": {"a": [1, 2, 3], "b": ["x", "y"]}, "quniform": {"n": [1, 3, 1]}})
    found = proposals("exhaustive", spaces, 100)
    assert len(found) == 18 == len({json.dumps(params) for params in found})
    assert found != sorted(found, key=json.dumps)  # a part of the grid is no corner of it
    assert found == proposals("exhaustive", spaces, 100) != proposals("exhaustive", spaces, 100, seed=2)


@pytest.mark.parametrize("algo", ["random", "bayes"])
def test_nothing_is_tried_twice(algo):
    if algo == "bayes":
        pytest.importorskip("hyperopt")
    found = proposals(algo, space_of({"choice": {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]}}), 100)
    assert len(found) == 16 == len({json.dumps(params) for params in found})


@pytest.mark.parametrize("algo", ["random", "bayes"])
def test_a_search_begins_with_the_setting_as_it_is(algo):
    pytest.importorskip("optuna")
    rates = [math.log(0.001), math.log(0.005)]
    given = {"choice": {"score": ["dot", "cosine"], "decay": [0, 0.1]}}
    given |= {"loguniform": {"rate": rates}, "quniform": {"layers": [1, 4, 1]}}
    spaces = space_of(given)
    spaces["t"] = replace(space_of({"choice": {"t": [0.07]}})["t"], condition=("score", ["cosine"]))
    present = {"score": "dot", "decay": 0.0, "rate": 0.005, "layers": 2, "t": 1.0}
    search = Search(algo, spaces, 0, present)
    first = search.propose([], True)
    assert first == {"score": "dot", "decay": 0, "rate": pytest.approx(0.005, rel=1e-12), "layers": 2}
    trials = [Trial(1, first, "done", 0.5)]
    assert search.frozen(trials[0]).params["layers"] == 2  # Optuna refuses what is outside of its distribution
    assert search.propose(trials, True) == Search(algo, spaces, 0).propose(trials, True) != first
    assert (
        search.propose([Trial(1, {**first, "layers": 3}, "done", 0.5)], True) == first
    )  # also where others were before
    for name, value in [
        ("score", "cosine"), ("score", None), ("rate", 0.006), ("rate", None), ("rate", True), ("rate", {1}),
        ("layers", 2.5), ("layers", True),
    ]:  # fmt: skip
        search = Search(algo, spaces, 0, {**present, name: value})
        assert search.start is None and search.propose([], True) == Search(algo, spaces, 0).propose([], True)


@pytest.mark.parametrize("bigger", [True, False])
def test_bayes_goes_where_scores_are_better(bigger):
    pytest.importorskip("optuna")
    spaces, sign = space_of({"uniform": {"x": [0, 10], "y": [0, 10]}}), 1 if bigger else -1

    def score(params):
        return -sign * ((params["x"] - 3) ** 2 + (params["y"] - 7) ** 2)

    search, trials = Search("bayes", spaces, 0), []
    for number in range(40):
        params = search.propose(trials, bigger)
        trials.append(Trial(number + 1, params, "done", score(params)))
        assert params == search.propose(trials[:-1], bigger)  # so a search that was stopped goes on as it would have
    losses = [abs(trial.score) for trial in trials]
    assert np.median(losses[-15:]) < np.median(losses[:10]) / 3


def test_a_search_that_cannot_be(monkeypatch):
    endless = space_of({"uniform": {"u": [0, 1]}})
    with pytest.raises(UserError, match="params_dict, u: there is no end of the values of uniform"):
        Search("exhaustive", endless, 0)
    with pytest.raises(UserError, match="'byes' is not one of exhaustive, random, bayes; did you mean 'bayes'"):
        Search("byes", endless, 0)
    with pytest.raises(UserError, match="the grid has 100,020,001 points"):
        Search("exhaustive", space_of({"quniform": {"a": [0, 10000, 1], "b": [0, 10000, 1]}}), 0)


def test_optuna_is_needed_by_bayes_alone(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    spaces = space_of({"choice": {"a": [1, 2]}})
    assert len(proposals("exhaustive", spaces, 9)) == len(proposals("random", spaces, 9)) == 2
    with pytest.raises(UserError, match="tuning needs Optuna, which the extra 'tune' brings; run: pip install 'optuna"):
        Search("bayes", spaces, 0)
