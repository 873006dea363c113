"""Checkpoints are whole or absent, load no code, and a bad one is named in one line."""

import errno
import json
import pathlib
import random

import pytest
import safetensors.torch
import torch

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.config import SSMConfig
from recbole_ssm.data import create_dataset
from recbole_ssm.errors import UserError
from recbole_ssm.model import get_model
from recbole_ssm.trainer import checkpoint, get_trainer


@pytest.fixture
def trained(toy):
    toy["config_dict"] |= {"epochs": 1}
    return run_recbole_ssm("Mamba4Rec", **toy)


def test_a_run_leaves_one_complete_file(trained, tmp_path):
    files = list((tmp_path / "saved").iterdir())
    assert [str(f.relative_to(tmp_path)) for f in files] == [trained["checkpoint"]]
    saved = checkpoint.read(files[0])
    assert saved.info["model"] == "Mamba4Rec"
    assert saved.info["catalogue"]["items"][0] == "[PAD]"
    assert saved.info["config"]["d_state"] == 32


def test_runs_of_one_second_do_not_overwrite_each_other(toy):
    config = SSMConfig("Mamba4Rec", toy["dataset"], config_dict=toy["config_dict"])
    model = get_model("Mamba4Rec")(config, create_dataset(config))
    names = set()
    for _ in range(3):
        trainer = get_trainer(config)(config, model)
        trainer._save_checkpoint(0, verbose=False)
        names.add(trainer.saved_model_file)
    assert len(names) == 3


def test_optimizer_and_epoch_come_back(toy, trained):
    config = SSMConfig("Mamba4Rec", toy["dataset"], config_dict=toy["config_dict"])
    model = get_model("Mamba4Rec")(config, create_dataset(config))
    trainer = get_trainer(config)(config, model)
    trainer.resume_checkpoint(trained["checkpoint"])
    assert trainer.start_epoch == 1
    assert trainer.best_valid_score == pytest.approx(trained["best_valid_score"])
    saved = checkpoint.read(pathlib.Path(trained["checkpoint"]))
    for index, state in trainer.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, saved.tensors[f"optimizer.{index}.{name}"])


def test_a_failing_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    checkpoint.write(path, {"a": torch.ones(3)}, {"n": 1})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path, {"a": torch.zeros(3)}, {"n": 2})
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]


def test_shared_and_strided_tensors_are_stored(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    checkpoint.write(tmp_path / "x", {"a": base, "b": base.t()}, {})
    assert torch.equal(checkpoint.read(tmp_path / "x").tensors["b"], base.t())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short or damaged"),
        (b"\x80\x04\x95 a pickle", "cut short or damaged"),
        (safetensors.torch.save({"a": torch.ones(1)}), "a safetensors file, but none that recbole_ssm wrote"),
        (safetensors.torch.save({"a": torch.ones(1)}, {"recbole_ssm": "{"}), "cut short or damaged"),
        (safetensors.torch.save({"a": torch.ones(1)}, {"recbole_ssm": "[]"}), "none that recbole_ssm wrote"),
        (safetensors.torch.save({}, {"recbole_ssm": json.dumps({"format": 99})}), "written by a later recbole_ssm"),
        (safetensors.torch.save({}, {"recbole_ssm": json.dumps({"format": 1})}), "its header is incomplete"),
    ],
)
def test_foreign_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_recommender(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_absent_file():
    with pytest.raises(UserError, match=r"checkpoint absent.safetensors: there is no such file"):
        load_recommender("absent.safetensors")


def test_cut_and_flipped_files_never_leave_a_traceback(trained, tmp_path):
    content = pathlib.Path(trained["checkpoint"]).read_bytes()
    rng = random.Random(0)
    header = int.from_bytes(content[:8], "little") + 8
    refused = 0
    for trial in range(60):
        if trial % 2:
            broken = bytearray(content)
            for _ in range(3):
                broken[rng.randrange(header)] = rng.randrange(256)
        else:
            broken = content[: rng.randrange(len(content))]
        path = tmp_path / "broken.safetensors"
        path.write_bytes(bytes(broken))
        try:
            load_recommender(path, device="cpu")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 30  # every cut file at least


def test_weights_of_another_size_are_refused(toy, trained):
    toy["config_dict"] |= {"d_state": 8}
    config = SSMConfig("Mamba4Rec", toy["dataset"], config_dict=toy["config_dict"])
    trainer = get_trainer(config)(config, get_model("Mamba4Rec")(config, create_dataset(config)))
    with pytest.raises(UserError, match="its weights do not fit this model .*size mismatch") as caught:
        trainer.resume_checkpoint(trained["checkpoint"])
    assert "\n" not in str(caught.value)
