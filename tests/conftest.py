"""Every test runs in a folder of its own: RecBole writes log/, log_tensorboard/ and saved/ where it stands."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).parent.parent

settings.register_profile(
    "default", max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("default")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h).__module__.startswith(("logging", "colorlog"))]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture
def toy():
    """Options of a run on the toy data set, in which item k is always followed by item k + 1."""
    return {
        "dataset": "toy",
        "config_dict": {"data_path": str(REPOSITORY / "dataset"), "show_progress": False, "state": "WARNING"},
    }


@pytest.fixture
def write_dataset(tmp_path):
    """Write ``data/<name>/<name>.inter`` and return the options that find it."""

    def write(text, name="made", suffix="inter", encoding="utf-8"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.{suffix}").write_bytes(text.encode(encoding) if isinstance(text, str) else text)
        return {"dataset": name, "config_dict": {"data_path": str(tmp_path / "data"), "show_progress": False}}

    return write
