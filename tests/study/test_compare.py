"""The commands, from the outside."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from recbole_ssm import study
from recbole_ssm.cli import main
from recbole_ssm.errors import UserError
from recbole_ssm.evaluation.metrics import protocol
from recbole_ssm.study import compare, report
from recbole_ssm.study.arms import read_arms
from recbole_ssm.study.child import machine
from recbole_ssm.study.outcome import Outcome, Run
from recbole_ssm.study.runs import Runs
from tests.conftest import REPOSITORY
from tests.study.conftest import alive, process_of, wait_for

TOY = ["--datasets=toy", f"--data_path={REPOSITORY / 'dataset'}"]


def never(*arguments):
    raise AssertionError("this run was done")


def test_compare(tmp_path, capsys, monkeypatch):
    command = ["compare", "--models", "SASRec,Mamba4Rec", *TOY, "--seeds=1", "--epochs=1", "--SASRec.n_layers=1"]
    command += ["--Mamba4Rec.dropout_prob=1.5e-1", f"--folder={tmp_path / 'out'}"]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "[2/2] Mamba4Rec toy epochs=1 dropout_prob=0.15 seed=2020: hit@10 " in first.err
    for text in ("## Results", "| toy | SASRec | 1 |", "SASRec - Mamba4Rec | 60 |", "  - SASRec: n_layers 1, "):
        assert text in first.out
    table = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert [row["model"] for row in table] == ["SASRec", "Mamba4Rec"]
    assert all(float(row["latency_p50_s"]) > 0 and float(row["users_per_second"]) > 0 for row in table)
    assert float(table[0]["hit"]) > 0.5  # of twenty items, so chance is not far from it
    monkeypatch.setattr(Runs, "_train", never)
    assert main(command) == 0
    assert capsys.readouterr().out == first.out  # speeds are kept too


def test_what_is_done_comes_first(tmp_path, capsys, monkeypatch):
    """The table of a study that is stopped in its first run has all that was done before."""
    command = ["compare", "--models=Mamba4Rec,Pop", *TOY, "--epochs=0", f"--folder={tmp_path}"]
    assert main([*command, "--seeds=1", "--seed=2021"]) == 0
    capsys.readouterr()

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runs, "_train", stopped)
    assert main([*command, "--seeds=2"]) != 0
    err = capsys.readouterr().err
    assert "[1/3] Mamba4Rec toy epochs=0 seed=2021" in err and "done before" in err and "1 of 3 runs are done" in err
    table = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert [(row["model"], row["seeds"]) for row in table] == [("Mamba4Rec", "1"), ("Pop", "0")]


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The runs that a study asks for; what came of each is made up."""
    asked = []

    def get(self, run, progress):
        folder = tmp_path / "made_up" / str(len(asked))
        folder.mkdir(parents=True)
        ranks = np.random.default_rng(len(asked)).integers(1, 30, 60).astype(float)
        np.savez(folder / "ranks.npz", user=np.arange(60).astype(str), rank=ranks, **{"rank of masked": ranks - 0.5})
        asked.append(run)
        figures = {name: {"hit@10": 0.5} for name in ("valid", "valid_masked", "test", "test_masked")}
        return Outcome(run, None, folder, **figures, protocol=protocol(self.config(run)), made=machine())

    monkeypatch.setattr(Runs, "get", get)
    monkeypatch.setattr(compare, "speeds", lambda runs, todo: [None for _ in todo])
    return asked


def test_both_orders_of_ties_are_arms_of_one_table(tmp_path, capsys, trained):
    """Each is tested against its like alone."""
    command = ["compare", "--models=GRU4Rec,Pop", *TOY, "--seeds=1", f"--folder={tmp_path}", "--ties=file,random"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "| toy | GRU4Rec, ties file | 1 | file |" in out and "| toy | Pop, ties random | 1 | random |" in out
    assert out.count("| GRU4Rec, ties file - Pop, ties file |") == 2  # unmasked and masked
    assert "GRU4Rec, ties file - Pop, ties random" not in out and "ties file - GRU4Rec, ties random" not in out
    table = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert [row["ties"] for row in table] == ["file", "random"] * 2
    assert sum(not row["p_best"] for row in table) == 2  # a best one of each order
    assert {row["split"] for row in table} == {"{'LS': 'valid_and_test'}"}
    assert [one.options["ties"] for one in trained] == ["file", "random"] * 2
    assert main([*command[:-1], "--ties=random"]) == 0
    assert "| toy | GRU4Rec | 1 | random |" in capsys.readouterr().out


def test_it_says_first_how_many_runs_there_are(tmp_path, capsys, trained, monkeypatch):
    """What draws no random numbers runs once."""
    command = ["compare", "--models=GRU4Rec,Pop", *TOY, "--seeds=3", f"--folder={tmp_path}"]
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == "4 runs: 2 rows of the table on 3 seeds; --seeds=1 takes fewer, for a first look"
    assert "| toy | GRU4Rec | 3 |" in out and "| toy | Pop | 1 |" in out and "| GRU4Rec - Pop | 60 |" in out
    assert out.rstrip().endswith("compare.json; a plot needs Matplotlib: pip install 'recbole-ssm[plot]'")


def test_rows_that_the_seed_draws_need_all_seeds(tmp_path, capsys, trained):
    command = ["compare", "--models=GRU4Rec,Pop", *TOY, "--seeds=3", "--eval_rows=9", f"--folder={tmp_path}"]
    assert main(command) == 0
    assert "| toy | Pop | 3 |" in capsys.readouterr().out


def test_help_calls_it_by_its_own_name(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "usage: recbole-ssm compare " in capsys.readouterr().out


def test_rows_that_a_file_names(tmp_path, capsys, trained):
    (tmp_path / "arms.yaml").write_text(
        "Deep: {model: GRU4Rec, num_layers: 2, seeds: 2}\n"
        "Both: {model: Pop, ties: [file, random]}\n"
        "eSASRec: {preset: ml-1m/eSASRec, hidden_size: 8, inner_size: 8, num_negatives: 9}\n"
        "Later: {model: GRU4Rec, eval_args: {split: {GTS: [0.8, 0.1, 0.1]}}, seeds: 1}\n"
    )
    command = ["compare", f"--arms={tmp_path / 'arms.yaml'}", *TOY, "--seeds=1", "--epochs=1", f"--folder={tmp_path}"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "| toy | Deep | 2 | file |" in out and "| toy | Both, ties random | 1 | random |" in out
    assert "| toy | eSASRec | 1 | file |" in out and "Deep - Both, ties file" in out and "NDCG@10 masked" in out
    assert "  - Deep: " in out and "num_layers 2" in out
    seeds = [one.options["seed"] for one in trained if one.model == "GRU4Rec"]
    assert seeds == [2020, 2020, 2021] and len(trained) == 6
    assert "| toy | Later | 1 | file | {'GTS': [0.8, 0.1, 0.1]} |" in out
    assert "Later - " not in out and "- Later |" not in out
    assert {one.options["epochs"] for one in trained} == {1}
    runs = json.loads((tmp_path / "compare.json").read_text())
    assert [one["row"] for one in runs] == ["Deep", "Deep", "Both, ties file", "Both, ties random", "eSASRec", "Later"]
    assert all(one["test_masked"] and one["protocol"]["split"] and one["valid"] for one in runs)


def test_a_preset_names_a_data_set_too(tmp_path):
    (tmp_path / "arms.yaml").write_text(
        "A: {preset: ml-1m/SASRec}\nB: {preset: ml-1m/SASRec, datasets: toy}\nC: {model: SASRec}\n"
    )

    def datasets(given):
        entries = read_arms(tmp_path / "arms.yaml", {}, given, 1)
        return {entry.label: entry.run.dataset for entry in entries}

    assert datasets(None) == {"A": "ml-1m", "B": "toy", "C": "ml-100k"}
    assert datasets(["amazon-beauty"]) == {"A": "amazon-beauty", "B": "toy", "C": "amazon-beauty"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A: {num_layers: 2}", "A: names no model; add model: 2Mamba4Rec, or a preset"),
        ("A: {model: SASRek}", "--arms: A: model: there is no sequential model 'SASRek'; did you mean 'SASRec'?"),
        ("A: {model: SASRec, seeds: 0}", "A: seeds must be at least 1, got 0"),
        ("A: {model: SASRec, ties: rand}", "A: ties must be one of file, random or a list of such, got 'rand'"),
        ("A: {model: SASRec, dataset: toy}", "A: dataset: here it is datasets"),
        ("A: {model: SASRec, seed: 1}", "A: seed: here it is seeds, and --seed for the first"),
        ("A: SASRec", "A: must be a mapping such as {'model': '2Mamba4Rec', 'seeds': 3}, got 'SASRec'"),
        ("A: {model: SASRec, n_layerz: 2}", "--arms: A: n_layerz: there is no such key; did you mean 'n_layers'?"),
        ("A: {preset: zzz}", "preset: there is no preset 'zzz'"),
        ("", "arms.yaml names no row; write one such as"),
    ],
)
def test_a_file_of_rows_that_is_wrong(tmp_path, capsys, monkeypatch, text, message):
    monkeypatch.setattr(Runs, "_train", never)
    (tmp_path / "arms.yaml").write_text(text)
    assert main(["compare", f"--arms={tmp_path / 'arms.yaml'}", *TOY]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="looks at /proc")
def test_a_killed_compare_goes_on(tmp_path, capsys):
    command = ["compare", "--models=Mamba4Rec", *TOY, "--seeds=1", "--epochs=20", "--stopping_step=1000"]
    command += ["--folder=out"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen(
        [sys.executable, "-m", "recbole_ssm", *command], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: list(tmp_path.glob("out/runs/*/checkpoints/*/step-*")))
    (unfinished,) = {path.parents[2] for path in tmp_path.glob("out/runs/*/checkpoints/*/step-*")}
    child = process_of(unfinished)
    assert alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not alive(child))  # a run ends with whoever asked for it, and leaves a checkpoint
    log = (unfinished / "log.txt").read_text()
    assert "Traceback" not in log and "Fatal" not in log
    assert not list(tmp_path.glob("out/runs/*/outcome.json"))
    assert main(command) == 0
    assert "[1/1] Mamba4Rec toy epochs=20 stopping_step=1000 seed=2020" in capsys.readouterr().err
    assert "Checkpoint loaded from" in (unfinished / "log.txt").read_text()
    assert [row["seeds"] for row in csv.DictReader((tmp_path / "out" / "compare.csv").open())] == ["1"]


def test_length(tmp_path, capsys):
    command = ["study", "length", "--models=Mamba4Rec", *TOY, "--lengths=9,3", "--epochs=1", f"--folder={tmp_path}"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "Mamba4Rec, 3 - Mamba4Rec, 9 | 60 |" in out
    table = list(csv.DictReader((tmp_path / "length.csv").open()))
    assert [(row["model"], row["max_length"]) for row in table] == [("Mamba4Rec, 3", "3"), ("Mamba4Rec, 9", "9")]
    assert all(float(row["seconds_per_epoch"]) > 0 for row in table)


def test_the_same_number_of_trials_for_every_model(tmp_path, monkeypatch):
    """The best by validation is taken, its own setting too, and a failed trial never."""
    tried = []

    def outcome(run, number):
        tried.append(run)
        score = {0: 0.2, 1: 0.3, 2: 0.9}[number // 2] if run.model == "SASRec" else 0.5 - number / 100
        error = "failed" if run.model == "SASRec" and number // 2 == 2 else None
        return Outcome(run, error, tmp_path, valid={"hit@1": score})

    monkeypatch.setattr(Runs, "all", lambda self, runs: [outcome(run, number) for number, run in enumerate(runs)])
    runs = Runs(tmp_path, {"data_path": str(REPOSITORY / "dataset")})
    todo = [Run("SASRec", "toy", {"epochs": 1}), Run("Mamba4Rec", "toy", {"epochs": 1})]
    sasrec, mamba = compare.tuned(runs, todo, 3, 7)
    assert [run.model for run in tried] == ["SASRec", "Mamba4Rec"] * 3
    assert all(run.options["seed"] == 7 and run.options["epochs"] == 1 for run in tried)
    assert mamba == todo[1]
    assert {**sasrec.options, "seed": 7} == tried[2].options and len(sasrec.options) > 1
    assert len({str(run) for run in tried}) == 6
    with pytest.raises(UserError, match="--tune: SASRec has 36 settings to try; take --tune=36 at most"):
        compare.tuned(runs, todo, 99, 7)
    given = Run("SASRec", "toy", {"n_layers": 1})
    default = runs.config(given)
    assert all("n_layers" not in params for params in compare.samples(given, 3, 7, default)), (
        "what is given is not tuned"
    )
    for model in ("SASRec", "Hydra4Rec"):  # none is the defaults once more
        one = Run(model, "toy")
        config = runs.config(one)
        points = compare.samples(one, 35, 2020, config)
        assert all(any(config[key] != value for key, value in point.items()) for point in points)
        assert len({str(point) for point in points}) == 35


def test_settings_cannot_be_chosen_without_a_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(Runs, "all", lambda self, runs: [Outcome(run, None, tmp_path) for run in runs])
    with pytest.raises(UserError, match="--tune: the split leaves no rows for validation"):
        compare.tuned(Runs(tmp_path), [Run("SASRec", "toy")], 1, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study"], "study: name one of compare: "),
        (["study", "lenght"], "study: there is no study 'lenght'; did you mean 'length'?"),
        (["compare", "--seeds=0"], "--seeds: must be at least 1, got 0"),
        (["compare", "--tune=-1"], "--tune: must be at least 0, got -1"),
        (["compare", "--seeds"], "--seeds has no value"),
        (["compare", "--models=SASRek"], "model: there is no sequential model 'SASRek'; did you mean 'SASRec'?"),
        (["compare", "--models=SASRec,SASRec"], "--models: SASRec stands twice"),
        (["compare", "--epochz=1"], "epochz: there is no such key; did you mean 'epochs'?"),
        (["compare", "--seed=abc"], "seed: must be a whole number from 0 up, the first of the seeds, got 'abc'"),
        (["compare", "--SASRec.seed=1"], "--SASRec.seed: all are compared on the same seeds; set --seed"),
        (["compare", "--datasets=ml-100k,"], "--datasets: a name is missing in 'ml-100k,'"),
        (["compare", "--model=SASRec"], "--model: here it is --models, with commas between names"),
        (["compare", "--SASRek.epochs=1"], "--SASRek.epochs: 'SASRek' is none of the models and data sets compared; d"),
        (["compare", "--eval_args={'mode': 'uni100'}"], "eval_args: models are compared by ranks among all items"),
        (
            ["compare", "--models=SASRec,Mamba4Rec", "--dropout_prob=0.3"],
            "SASRec: dropout_prob: there is no such key; did you mean 'attn_dropout_prob'? (a key of some models alone "
            "is written --MODEL.KEY)",
        ),
        (
            ["compare", "--eval_args={'split': {'LS': 'valid_only'}}"],
            "eval_args: split: {'LS': 'valid_only'} leaves no rows to test, by which models are compared",
        ),
        (
            ["compare", "--tune=2", "--eval_args={'split': {'LS': 'test_only'}}"],
            "eval_args: split: {'LS': 'test_only'} leaves no rows for validation, by which settings are chosen",
        ),
        (
            ["compare", "--models=STAMP", "--tune=2"],
            "--tune: no search space ships for STAMP; leave it out of --models",
        ),
        (["compare", "--datasets=ml-100kk"], "dataset ml-100kk: no file ml-100kk.inter in "),
        (["study", "length", "--SASRec.MAX_ITEM_LIST_LENGTH=9"], "MAX_ITEM_LIST_LENGTH: here it is --lengths"),
        (["study", "length", "--lengths=1,x"], "--lengths: must be whole numbers with commas, got 1,x"),
        (["study", "length", "--lengths=0"], "--lengths: must be at least 1, got 0"),
        (["study", "length", "--MAX_ITEM_LIST_LENGTH=9"], "--MAX_ITEM_LIST_LENGTH: here it is --lengths"),
    ],
)
def test_mistakes(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(Runs, "_train", never)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert main(["study", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in study.STUDIES)
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    out = capsys.readouterr().out
    assert "--tune N" in out and "--SASRec.n_layers=1" in out
