"""What users of version 0.1.0 have on their disks and in their scripts still works.

The files under ``fixtures/0.1.0`` were written by that version, with the ``make.py`` that lies beside them.
"""

import csv
import importlib
import json
import shutil

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.study import compare, runs
from recbole_ssm.trainer.checkpoint import settings_of
from tests.conftest import REPOSITORY

FIXTURE = REPOSITORY / "tests" / "fixtures" / "0.1.0"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.fixture
def home(tmp_path):
    """A copy of all that 0.1.0 wrote, in the working directory, with the toy data set."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    shutil.copytree(REPOSITORY / "dataset" / "toy", tmp_path / "dataset" / "toy")
    return tmp_path


def files_of(folder):
    """Each file's size and time of writing: a run that is trained again writes all of its files."""
    statuses = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in statuses.items()}


@pytest.mark.parametrize("model", EXPECTED["recommended"])
def test_checkpoints_recommend_the_same_items(model):
    found = load_recommender(FIXTURE / f"{model}.safetensors", "cpu").recommend(["i3", "i4", "i5"], 5)
    expected = EXPECTED["recommended"][model]
    assert [item for item, _ in found] == [item for item, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-4, abs=1e-5)


def test_an_interrupted_run_goes_on_as_if_it_had_never_been_killed(home):
    options = {"data_path": str(home / "dataset"), "show_progress": False, "state": "WARNING"}
    result = run_recbole_ssm(resume=home / "run", config_dict=options)
    for key in ("best_valid_score", "best_valid_result", "test_result"):
        assert result[key] == pytest.approx(EXPECTED["resumed"][key], abs=1e-3), key
    last = max((home / "run").glob("step-*"))
    assert last.name == "step-000000020.safetensors"
    found, expected = load_file(last), load_file(FIXTURE / "never-killed.safetensors")
    # The tokens of items were no tensors then.
    found = {name: tensor for name, tensor in found.items() if not name.startswith("catalogue.")}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # equal but for how another processor rounds
        assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def without_speeds(table):
    """The rows of a table but for what is measured again by another version, or on another machine."""
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row.pop(column)) > 0 for row in rows for column in ("latency_p50_s", "users_per_second"))
    return rows


def test_compare_trains_nothing_that_is_done(home):
    folder = home / "compare"
    runs, before = files_of(folder / "runs"), without_speeds(folder / "compare.csv")
    assert main(EXPECTED["compare"].split()) == 0
    assert runs.items() <= files_of(folder / "runs").items()
    assert [
        path for path in (folder / "runs").iterdir() if path.is_dir() and not set(path.iterdir()) <= runs.keys()
    ] == []
    assert without_speeds(folder / "compare.csv") == before


def test_tune_goes_on_where_it_was_stopped(home):
    before = files_of(home / "tune" / "runs")
    (table,) = home.glob("tune/*/trials.csv")
    with open(table, newline="") as file:
        done = list(csv.DictReader(file))
    assert main([*EXPECTED["tune"].split(), "--max_evals=3"]) == 0
    after = files_of(home / "tune" / "runs")
    assert {path: after[path] for path in before} == before
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[: len(done)] == done
    assert [row["status"] for row in rows] == ["done"] * 3
    assert len(list(home.glob("tune/runs/*/outcome.json"))) == 3


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_neither_a_new_key_nor_a_new_version_trains_again(command, home, monkeypatch):
    def with_a_new_key(config):
        return {**settings_of(config), "a_new_key": "its default"}

    monkeypatch.setattr(runs, "settings_of", with_a_new_key)
    monkeypatch.setattr("recbole_ssm.__version__", "9.0.0")
    monkeypatch.setattr(runs.Runs, "_train", lambda *arguments: pytest.fail("this run was done"))
    monkeypatch.setattr(compare, "speeds", lambda runs, todo: [None] * len(todo))
    before = {path.name for path in (home / command).iterdir() if path.is_dir()}
    assert main([*EXPECTED[command].split(), *(["--max_evals=2"] if command == "tune" else [])]) == 0
    assert {path.name for path in (home / command).iterdir() if path.is_dir()} == before


@pytest.mark.parametrize("module", EXPECTED["public"])
def test_public_names_can_be_imported(module):
    imported = importlib.import_module(module)
    assert [name for name in EXPECTED["public"][module] if not hasattr(imported, name)] == []
