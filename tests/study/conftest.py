"""Runs are other processes: how to wait for one, and to know whether it lives."""

import os
import pathlib
import time

import pytest


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
