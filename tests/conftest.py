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


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cuda", "cpu"), help="where tests/test_device.py computes; otherwise it is skipped"
    )


@pytest.fixture
def device(request):
    """The device of ``--device``."""
    name = request.config.getoption("--device")
    if name is None:
        pytest.skip("needs a device: pytest --device=cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device=cuda: PyTorch finds no GPU here")
    return torch.device(name)


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


@pytest.fixture
def titled(write_dataset):
    """Options of a run on 12 items with titles, in which item k is always followed by item k + 1 in a circle."""
    colours, things = ("red", "green", "blue", "white"), ("table", "garden", "engine")
    titles = [f"The {colour} {thing}" for colour in colours for thing in things]
    rows = [
        f"u{user}\ti{(user + 5 * (user // 12) + event) % 12}\t{event}"
        for user in range(48)
        for event in range(6 + user % 4)
    ]
    options = write_dataset("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n")
    lines = [f"i{item}\t{title}" for item, title in enumerate(titles)]
    write_dataset("item_id:token\ttitle:token_seq\n" + "\n".join(lines) + "\n", suffix="item")
    options["config_dict"] |= {"topk": [1, 5], "valid_metric": "Hit@1", "state": "WARNING", "train_last": None}
    return options
