"""A run that is done, and, as runs are other processes, how to wait for one and to know whether it lives."""

import os
import pathlib
import time

import pytest

from recbole_ssm.study.outcome import Run
from recbole_ssm.study.runs import Runs
from tests.conftest import REPOSITORY

DATA = {"data_path": str(REPOSITORY / "dataset")}
SHORT = Run("Mamba4Rec", "toy", {"seed": 1, "epochs": 2})


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # beside other work two threads wait for each other
        yield


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "that never came"
        time.sleep(0.05)


def process_of(folder):
    """The process that trains a run."""
    return int((folder / "lock").read_text())


def alive(process):
    try:
        os.kill(process, 0)
        return pathlib.Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A folder in which SHORT is done."""
    runs = Runs(tmp_path_factory.mktemp("done"), DATA)
    return runs, runs.get(SHORT)


def never(*arguments, **options):
    raise AssertionError("this run was done")
