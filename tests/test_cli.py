"""The command line, from the outside."""

import errno
import subprocess
import sys

import pytest

from recbole_ssm import __version__
from recbole_ssm.cli import main
from tests.conftest import REPOSITORY


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "--model=2Mamba4Rec" in capsys.readouterr().out


def test_doctor_names_versions_device_and_kernels(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"recbole_ssm {__version__}" in out
    for word in ("recbole", "torch", "device", "usable: reference, torch", "mamba-ssm", "causal-conv1d"):
        assert word in out


def test_doctor_knows_a_triton_whose_distribution_has_another_name(monkeypatch):
    import importlib.metadata
    import types

    from recbole_ssm.doctor import report
    from recbole_ssm.ops import backend

    real = importlib.metadata.version

    def version(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "numpy" else real(name)

    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.9.9"))
    monkeypatch.setattr(backend, "_lacks", {"cuda": ""})
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=1.26", "torch<2; extra == 'old'"])
    text = report()
    assert "  cuda kernels   Triton 3.9.9" in text and "without PyTorch" not in text
    # What is there and too old is told as well.
    assert "  numpy          1.0, but >=1.26 is needed" in text and "\n  pip install 'numpy>=1.26'" in text


def test_doctor_says_where_tile_sizes_are_kept(monkeypatch, tmp_path):
    from recbole_ssm.doctor import report
    from recbole_ssm.ops import backend

    monkeypatch.setenv("RECBOLE_SSM_CACHE", str(tmp_path))
    monkeypatch.setattr(backend, "_lacks", {"cuda": "there is no GPU"})
    assert "tile sizes" not in report()
    monkeypatch.setattr(backend, "_lacks", {"cuda": ""})
    assert f"chosen for 0 kinds of calls on no GPU, in {tmp_path / 'tiles.json'}" in report()


def test_doctor_tells_of_threads_that_spin(monkeypatch):
    from recbole_ssm.doctor import report

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert "CPU, 4 threads; no GPU that PyTorch can use; where other work runs beside it, set OMP_WAIT" in report()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "OMP_WAIT_POLICY" not in report()


def test_doctor_compares_the_backends(capsys, monkeypatch, caplog):
    assert main(["doctor", "--numerics"]) == 0
    assert "all backends agree" in capsys.readouterr().out


def test_a_wrong_backend_is_switched_off(capsys, monkeypatch, caplog):
    from recbole_ssm.ops import backend

    right = backend.implementations("ssd", "torch")[0].function
    monkeypatch.setattr(backend, "_implementations", dict(backend._implementations))
    monkeypatch.setitem(backend._implementations, ("ssd", "torch"), backend.implementations("ssd", "torch"))
    backend.implements("ssd", "faulty")(lambda *arguments: (right(*arguments)[0] * 1.001, None))
    monkeypatch.setattr(backend, "BACKENDS", (*backend.BACKENDS, "faulty"))
    assert "faulty" in backend.available_backends("ssd")
    assert main(["doctor", "--numerics"]) == 2
    out, error = capsys.readouterr()
    assert "FAILED" in out and "a backend is wrong on this machine" in error
    assert "op ssd: backend faulty is switched off: doctor finds it wrong" in caplog.text
    assert "faulty" not in backend.available_backends()


def test_doctor_gives_the_line_for_what_is_missing(monkeypatch):
    import importlib.metadata

    from recbole_ssm.doctor import report

    real = importlib.metadata.version

    def version(name):
        if name == "recbole":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "pip install --no-deps recbole==1.2.1" in report()


def test_doctor_says_how_the_kernels_of_others_are_built(monkeypatch):
    from recbole_ssm import doctor

    assert "  flash-linear-attention not installed; our ops do not use it" in doctor.report()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "_device", lambda: "GPU")
    assert "  MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation 'mamba-ssm" in doctor.report()


def test_doctor_reports_where_torch_cannot_be_imported():
    code = """
import sys
sys.modules["torch"] = None
from recbole_ssm.cli import main
assert main(["doctor"]) == 0
assert main(["doctor", "--numerics"]) == 2
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert found.returncode == 0, found.stderr
    assert f"recbole_ssm {__version__}, Python" in found.stdout and "  safetensors  " in found.stdout
    assert "import of torch halted" in found.stdout and "pip install --force-reinstall torch" in found.stdout
    assert found.stderr.startswith("recbole_ssm: error: torch is needed and cannot be imported")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dotcor"], "there is no command 'dotcor'; did you mean 'doctor'?"),
        (["doctor", "x"], "doctor takes no arguments but --numerics, got x"),
        (["--model=SASrec"], "model: there is no sequential model 'SASrec'; did you mean 'SASRec'?"),
        (["--model=SASRec", "--model=GRU4Rec"], "--model is given twice, as SASRec and as GRU4Rec; keep one"),
        (["--learning_rate=1", "--learning_rate=2"], "--learning_rate is given twice"),
        (["--resume=", "--epochs=3"], "resume: names no checkpoint; give a file, or the folder of a run"),
        (["--init", ""], "init: names no checkpoint"),
        (["--epochs"], "--epochs has no value; options look like --epochs=VALUE"),
        (["--allow_pickle", "--epochs=30"], "--allow_pickle has no value"),
        (["--resume=x.pth", "--allow_pickle=yes"], "--allow_pickle: must be True or False, got yes"),
        (["--epochz=3"], "epochz: there is no such key; did you mean 'epochs'?"),
        (["--config_files=absent.yaml"], "config file absent.yaml: No such file or directory"),
        (["--head_dim=24"], "head_dim: 24 does not divide expand * hidden_size = 128; try head_dim: 16"),
        (
            ["-m", "Hydra4Rec", "--d_conv", "4"],
            "d_conv: a centred convolution needs an odd width, got 4; try d_conv: 5",
        ),
        (["-m", "SASRec", "--weight_decay=-1"], "weight_decay: must be 0 or more, got -1"),
        (
            ["-m", "SASRec", "--n_heads=5"],
            "SASRec: The hidden size (64) is not a multiple of the number of attention heads (5)",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if line.startswith("recbole_ssm: error: "))
    assert line.startswith(f"recbole_ssm: error: {message}")
    assert "Traceback" not in err


def test_config_files_name_model_and_data_set(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("model: GRU4Rec\ndataset: toy\nepochs: 1\nshow_progress: False\n")
    (tmp_path / "b.yaml").write_text(f"data_path: {REPOSITORY / 'dataset'}\n")
    assert main(["--config_files", "a.yaml b.yaml"]) == 0
    assert list((tmp_path / "saved").glob("GRU4Rec-toy-*/best.safetensors"))


@pytest.mark.parametrize(
    "command", [[sys.executable, str(REPOSITORY / "run_recbole_ssm.py")], [sys.executable, "-m", "recbole_ssm"]]
)
def test_end_to_end_on_ml_100k(command, tmp_path):
    """The main job in a process of its own, cut to a fraction of the interactions; then its checkpoint serves."""
    options = ["--model=2Mamba4Rec", "--epochs=1", "--user_inter_num_interval=[250,inf)", "--show_progress=False"]
    found = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.strip().startswith("test result") and "recbole-ssm recommend saved" in found.stdout
    assert len((found.stdout + found.stderr).splitlines()) <= 40 and "WARNING" not in found.stderr
    checkpoint = next((tmp_path / "saved").glob("*/best.safetensors"))
    code = f"""
from recbole_ssm import load_recommender
print(len(load_recommender({str(checkpoint)!r}).recommend(["50", "172"], k=10)))
"""
    served = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert served.stdout.strip() == "10", served.stderr


def test_a_failing_disk_is_one_line(monkeypatch, capsys):
    def full(path, tensors, info):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("recbole_ssm.trainer.checkpoint.write", full)
    options = ["--dataset=toy", f"--data_path={REPOSITORY / 'dataset'}", "--epochs=1", "--show_progress=False"]
    assert main(options) == 1
    assert "recbole_ssm: error: [Errno 28] No space left on device: 'saved" in capsys.readouterr().err


def test_same_seed_same_bytes(toy):
    """Two runs of one seed give the same weights, bit for bit."""
    from pathlib import Path

    import torch

    from recbole_ssm import run_recbole_ssm
    from recbole_ssm.trainer import checkpoint

    toy["config_dict"] |= {"epochs": 2}
    first, second = (checkpoint.read(Path(run_recbole_ssm("Hydra4Rec", **toy)["checkpoint"])).tensors for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
