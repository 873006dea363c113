"""Runs are done once, go on after a kill, and fail alone."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recbole_ssm.errors import UserError
from recbole_ssm.files import locked
from recbole_ssm.study import child
from recbole_ssm.study import runs as module
from recbole_ssm.study.outcome import OUTCOME, RANKS, RUN, Outcome, Run
from recbole_ssm.study.runs import Runs
from recbole_ssm.trainer import checkpoint
from tests.study.conftest import DATA, SHORT, never, process_of, wait_for

LONG = Run("Mamba4Rec", "toy", {"seed": 1, "epochs": 12, "stopping_step": 1000, "dropout_prob": 0.5})


def test_what_a_run_leaves(done):
    _, outcome = done
    assert outcome.error is None and outcome.run == SHORT and outcome.epochs == 2
    assert (outcome.parameters, outcome.items, outcome.latency) == (73_600, 20, None)
    assert outcome.peak_memory > 10**7
    assert outcome.protocol == {"split": {"LS": "valid_and_test"}, "mode": {"valid": "full", "test": "full"},
                                "ties": "file", "seed": 1}  # fmt: skip
    first, last = outcome.history
    assert (first["epoch"], first["targets"], first["steps"], first["batch_size"]) == (1, 537, 5, 128)
    assert (last["epoch"], last["targets"], last["steps"], last["step_size"]) == (2, 2 * 537, 10, 0.01)
    assert 0 < first["seconds"] < last["seconds"] == outcome.seconds
    assert max(first["valid"], last["valid"]) == outcome.valid["hit@1"]
    users, ranks = outcome.ranks()
    assert sorted(users) == sorted(f"u{n}" for n in range(60)) and ranks.min() >= 1
    assert abs(outcome.test["hit@10"] - np.mean(ranks <= 10)) < 1e-4
    assert {"date", "torch", "cpu", "threads"} <= set(outcome.made)
    assert {path.name for path in outcome.folder.iterdir()} >= {"outcome.json", "ranks.npz", "log.txt"}
    assert not (outcome.folder / "checkpoints").exists()


def test_done_once(done, monkeypatch, capsys):
    runs, outcome = done
    monkeypatch.setattr(Runs, "_train", never)
    assert runs.get(SHORT) == outcome
    spelled = Run("Mamba4Rec", "toy", {**SHORT.options, "d_state": 32, "eval_batch_size": 5})
    again = Runs(runs.folder, {**DATA, "show_progress": True, "use_gpu": False})
    assert [outcome.run for outcome in again.all([SHORT, spelled])] == [SHORT, spelled]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/2] Mamba4Rec toy seed=1 epochs=2: hit@10 ") and lines[0].endswith("; done before")


def test_a_failed_run_stops_nothing_and_is_tried_again(tmp_path, capsys):
    diverges = Run("SASRec", "toy", {"learner": "sgd", "learning_rate": 1e30, "weight_decay": 1.0, "epochs": 5})
    runs = Runs(tmp_path / "r", DATA)
    outcomes = list(runs.all([Run("SASRec", "toyy"), diverges, Run("SASRec", "toy", {"epochz": 1})]))
    messages = ["dataset toyy: no file toyy.inter", "the training loss became nan", "epochz: there is no such key"]
    for outcome, message in zip(outcomes, messages):
        assert message in outcome.error and "\n" not in outcome.error
        with pytest.raises(UserError, match="it has no ranks"):
            outcome.ranks()
    assert "[2/3] SASRec toy learner=sgd" in capsys.readouterr().err
    size = (outcomes[1].folder / "log.txt").stat().st_size
    assert "loss became nan" in runs.get(diverges).error
    assert (outcomes[1].folder / "log.txt").stat().st_size > size


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"run": []}'])
def test_a_damaged_outcome_is_one_line(tmp_path, text):
    (tmp_path / OUTCOME).write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}: damaged .* delete that folder"):
        Outcome.read(tmp_path)


def test_all_ranks_are_looked_at(done, tmp_path):
    folder = shutil.copytree(done[1].folder, tmp_path / "r")
    whole = (folder / RANKS).read_bytes()
    with np.load(folder / RANKS) as file:
        ranks = dict(file)
    assert set(ranks) == {"user", "rank", "rank of masked"}
    for name in ranks:
        place = whole.index(f"{name}.npy".encode()) + len(name) + 30
        (folder / RANKS).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            Outcome.read(folder)
    del ranks["rank of masked"]
    np.savez(folder / RANKS, **ranks)
    with pytest.raises(UserError, match="damaged"):
        Outcome.read(folder)


@pytest.mark.parametrize("name", [OUTCOME, RANKS])
def test_what_is_damaged_is_trained_again(done, tmp_path, monkeypatch, caplog, name):
    runs = Runs(tmp_path / "r", DATA)
    folder = shutil.copytree(done[1].folder, runs.folder_of(SHORT))
    (folder / name).write_bytes(b"\x80 nonsense")
    neighbour = tmp_path / "r" / "Mamba4Rec-toy-neighbour"
    neighbour.mkdir()
    (neighbour / RUN).write_text("")  # of a run that was killed as it began

    def train(self, run, where, progress):
        assert where == folder and not folder.exists()
        shutil.copytree(done[1].folder, folder)

    monkeypatch.setattr(Runs, "_train", train)
    assert runs.get(SHORT).test == done[1].test
    assert "damaged" in caplog.text and "it is trained again" in caplog.text
    (aside,) = runs.folder.glob("damaged-*")
    assert (aside / name).read_bytes() == b"\x80 nonsense"
    (folder / name).write_bytes(b"")
    runs.get(SHORT)
    assert len(list(runs.folder.glob("damaged-*"))) == 2


def test_what_cannot_be_read_now_is_kept(done, tmp_path, monkeypatch):
    """Too many files are open, or a network's disk is away."""
    runs = Runs(tmp_path / "r", DATA)
    shutil.copytree(done[1].folder, runs.folder_of(SHORT))
    read = Path.read_text

    def failing(self, *arguments, **options):
        if self.name == OUTCOME:
            raise OSError(errno.EMFILE, "Too many open files", str(self))
        return read(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing)
        patch.setattr(Runs, "_train", never)
        (outcome,) = runs.all([SHORT])
    assert outcome.error.endswith(f"{OUTCOME}: Too many open files")
    assert runs.get(SHORT).test == done[1].test


def test_what_a_later_version_wrote_is_read(done, tmp_path, monkeypatch):
    runs = Runs(tmp_path / "r", DATA)
    folder = shutil.copytree(done[1].folder, runs.folder_of(SHORT))
    values = json.loads((folder / OUTCOME).read_text())
    values["run"]["machines"] = values["energy"] = 3
    (folder / OUTCOME).write_text(json.dumps(values))
    monkeypatch.setattr(Runs, "_train", never)
    assert runs.get(SHORT) == replace(done[1], folder=folder)


def test_paths_hold_in_another_folder_and_nothing_else_is_one(tmp_path, monkeypatch):
    """A run trains in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("saved", "random", "ml-1m/2Mamba4Rec", "pre"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "weights").write_text("")

    def absolute(key, value, model="LlamaRec"):
        return module._absolute(model, key, value) == str(tmp_path / value)

    assert (
        absolute("retriever_checkpoint", "saved") and absolute("base_model", "saved") and absolute("data_path", "new")
    )
    assert absolute("my_file", "weights", "my_models:Mine")
    assert absolute("my_folder", "ml-1m/2Mamba4Rec", "my_models:Mine")
    assert not absolute("pooling", "saved", "my_models:Mine") and not absolute("note", "", "my_models:Mine")
    assert not absolute("base_model", "random") and not absolute("base_model", "some/hub-name")
    assert not absolute("preset", "ml-1m/2Mamba4Rec") and not absolute("norm_position", "pre")


def test_a_run_that_is_given_up_has_no_checkpoints_unless_another_process_is_at_it(tmp_path):
    runs = Runs(tmp_path / "r", DATA)
    runs.give_up(SHORT)
    checkpoints = runs.folder_of(SHORT) / "checkpoints" / "one"
    checkpoints.mkdir(parents=True)
    with locked(runs.folder_of(SHORT)):
        runs.give_up(SHORT)
    assert checkpoints.is_dir()
    runs.give_up(SHORT)
    assert not checkpoints.parent.exists()


def test_a_data_file_that_cannot_be_read_fails_its_runs_alone(tmp_path, monkeypatch):
    data = shutil.copytree(Path(DATA["data_path"]) / "toy", tmp_path / "data" / "toy")
    files = sorted(path.name for path in data.glob("toy.*"))
    (data / "toy.old").mkdir()
    runs = Runs(tmp_path / "r", {"data_path": str(tmp_path / "data")})
    assert sorted(runs.content(SHORT)["files"]) == files

    def denied(self, path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Runs, "_file_digest", denied)
    (outcome,) = runs.all([SHORT])
    assert outcome.error.startswith("toy: ") and outcome.error.endswith("cannot be read (Permission denied)")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_and_gone_on_is_never_killed(tmp_path):
    straight = Runs(tmp_path / "straight", DATA).get(LONG)
    runs = Runs(tmp_path / "killed", DATA)

    def kill():
        wait_for(lambda: list(runs.folder.glob("*/checkpoints/*/step-*")))  # once there is one to go on from
        (folder,) = runs.folder.iterdir()
        os.kill(process_of(folder), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    stopped = runs.get(LONG)
    killer.join()
    assert "its process ended with signal 9; see " in stopped.error
    first = []
    found = runs.get(LONG, lambda state: first.append(state["epoch"]))
    assert found.error is None and min(first) > 1
    assert (found.test, found.valid) == (straight.test, straight.valid)
    assert all((a == b).all() for a, b in zip(found.ranks(), straight.ranks()))
    timeless = [[{**entry, "seconds": 0} for entry in outcome.history] for outcome in (found, straight)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 12


def test_a_run_goes_on_from_its_own_checkpoints_or_from_those_of_its_first_stage(tmp_path):
    def write(name, **info):
        checkpoint.write(tmp_path / name / "step-000000001.safetensors", {}, info)
        return tmp_path / name

    write("GRU4Rec-alone", model="GRU4Rec")
    stage = write("GRU4Rec-stage", model="GRU4Rec", **{"for": {"model": "LlamaRec", "options": {}}})
    assert child._interrupted(tmp_path, "LlamaRec") == stage
    own = write("LlamaRec-own", model="LlamaRec")
    os.utime(own, (1, 1))
    assert child._interrupted(tmp_path, "LlamaRec") == own
    assert child._interrupted(tmp_path, "SASRec") is None and not tmp_path.exists()
