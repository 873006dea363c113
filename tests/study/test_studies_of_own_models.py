"""Studies of a user's own model, which lies in the working folder."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from recbole_ssm.cli import main
from recbole_ssm.errors import UserError
from recbole_ssm.study import child
from recbole_ssm.study import runs as module
from recbole_ssm.study.outcome import RUN, Outcome, Run
from recbole_ssm.study.runs import Runs
from recbole_ssm.trainer import checkpoint
from tests.study.conftest import DATA

MINE = "mine_of_studies"
RUN_OF_MINE = Run(f"{MINE}:Mine", "toy", {"epochs": 1})


@pytest.fixture(autouse=True)
def _mine(monkeypatch):
    """A class and, in another file, the one that it extends; the console script has its own folder in the path."""
    Path(f"{MINE}.py").write_text(
        f"import {MINE}_base, {MINE}_part\n\n\nclass Mine({MINE}_base.Base, {MINE}_part.Part):\n    pass\n"
    )
    Path(f"{MINE}_part.py").write_text("class Part:\n    pass\n")
    Path(f"{MINE}_base.py").write_text("from recbole_ssm.model import SASRec\n\n\nclass Base(SASRec):\n    pass\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).absolute() != Path.cwd()])
    yield
    for name in (MINE, f"{MINE}_base", f"{MINE}_part"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", [MINE, f"{MINE}_base", f"{MINE}_part"])
def test_other_source_makes_another_run(tmp_path, name):
    runs = Runs(tmp_path / "r", DATA)
    before, others = runs.folder_of(RUN_OF_MINE), runs.folder_of(Run("SASRec", "toy"))
    with open(f"{name}.py", "a") as file:
        file.write("# Another text.\n")
    assert runs.folder_of(RUN_OF_MINE) != before and runs.folder_of(Run("SASRec", "toy")) == others


def test_its_folder_has_a_name_that_windows_allows(tmp_path):
    assert Runs(tmp_path / "r", DATA).folder_of(RUN_OF_MINE).name.startswith(f"{MINE}.Mine-toy-")


def test_the_process_of_a_run_finds_it(tmp_path, monkeypatch):
    seen = []

    def started(command, cwd, env, **options):
        seen.append((cwd, env))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.subprocess, "Popen", started)
        Runs(tmp_path / "r", DATA).get(RUN_OF_MINE)
    ((cwd, env),) = seen
    look = f"import importlib.util; assert importlib.util.find_spec({MINE!r})"
    subprocess.run([sys.executable, "-c", look], cwd=cwd, env=env, check=True)


def test_what_it_prints_is_in_the_log_alone(tmp_path):
    """By whatever way; the lines of its process say how far the run is."""
    with open(f"{MINE}.py", "a") as file:
        file.write("import os\n\nprint(3)\nos.write(1, b'4\\n')\n")
    outcome = Runs(tmp_path / "r", DATA).get(RUN_OF_MINE)
    assert outcome.error is None and outcome.epochs == 1
    assert {"3", "4"} <= set((outcome.folder / "log.txt").read_text().splitlines())


def test_it_is_tuned_by_its_path(tmp_path, monkeypatch):
    def get(self, run, progress):
        self.config(run)
        return Outcome(run, None, tmp_path, valid={"hit@1": run.options["n_layers"] / 9}, test={"hit@1": 0.5})

    monkeypatch.setattr(Runs, "get", get)
    (tmp_path / "s.hyper").write_text("n_layers choice [1, 2]\n")
    command = ["tune", f"--model={MINE}:Mine", "--dataset=toy", f"--data_path={DATA['data_path']}"]
    assert main([*command, "--params_file=s.hyper", "--valid_metric=Hit@1", "--topk=[1]", "--folder=out"]) == 0
    (best,) = Path("out").glob("*/best.yaml")
    found = yaml.safe_load(best.read_text())
    assert (found["model"], found["n_layers"]) == (f"{MINE}:Mine", 2)


@pytest.mark.parametrize(
    ("model", "dataset", "name"), [(f"{MINE}:Mine", "toy", "Mine-toy"), ("SASRec", "a[1]", "SASRec-a[1]")]
)
def test_its_interrupted_run_goes_on(tmp_path, monkeypatch, model, dataset, name):
    """Also that of a data set whose name reads like a pattern, and beside the checkpoints of another model."""
    content = Runs(tmp_path / "r", DATA).content(Run(model, "toy"))
    job = {"run": asdict(Run(model, dataset)), "options": DATA, "content": content}
    module.write_json(tmp_path / RUN, job)
    for folder in (f"{name}-1", f"{name}-2", "GRU4Rec-toy-3"):
        (tmp_path / "checkpoints" / folder).mkdir(parents=True)
    os.utime(tmp_path / "checkpoints" / f"{name}-1", (1, 1))
    resumed = []

    def damaged_if_second(folder):
        if folder.name.endswith("-2"):
            raise UserError("damaged")
        return folder, SimpleNamespace(info={"model": folder.name.partition("-")[0]})

    def trained(*arguments, resume, **options):
        resumed.append(resume)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "newest", damaged_if_second)
    monkeypatch.setattr(child, "run_recbole_ssm", trained)
    with pytest.raises(KeyboardInterrupt):
        child._train(tmp_path, sys.stdout)
    assert resumed == [tmp_path / "checkpoints" / f"{name}-1"]
