"""Two processes equal one: the same weights to rounding, the same metrics."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from recbole_ssm.trainer import checkpoint

REPOSITORY = pathlib.Path(__file__).parent.parent.parent

CODE = """
import json, os, pathlib, sys
from recbole_ssm import run_recbole_ssm
from recbole_ssm.trainer import Hook

model, options = sys.argv[1], json.loads(sys.argv[2])


class Kill(Hook):
    def on_step_end(self, trainer, step, loss):
        if trainer.global_step == kill_at:
            raise SystemExit(7)


kill_at = options.pop("kill_at", None)
resume = options.pop("resume", None)
given = (None, None) if resume else (model, "toy")
hooks = [Kill()] if kill_at else []
result = run_recbole_ssm(*given, config_dict={} if resume else options, resume=resume, hooks=hooks)
# A thread of the group that is still there could abort the process while Python ends.
threads = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads
if int(os.environ.get("RANK", "0")) == 0:
    pathlib.Path("result.json").write_text(json.dumps([result["test_result"], result["checkpoint"]]))
"""


def run(folder, processes, model, killed=False, **options):
    folder.mkdir(exist_ok=True)
    (folder / "main.py").write_text(CODE)
    options |= {
        "data_path": str(REPOSITORY / "dataset"),
        "show_progress": False,
        "topk": [1, 5],
        "epochs": 3,
        "use_gpu": False,
    }
    options |= {"metric_decimal_place": 10, "state": "WARNING"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    launcher = [sys.executable] if processes == 1 else [*torchrun, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [*launcher, "main.py", model, json.dumps(options)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if killed:
        assert done.returncode
        return None
    assert done.returncode == 0, done.stderr[-3000:]
    metrics, path = json.loads((folder / "result.json").read_text())
    return metrics, checkpoint.newest((folder / path).parent)[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("2Mamba4Rec", {"dropout_prob": 0.0}),
        ("Hydra4Rec", {"dropout_prob": 0.0, "train_batch_size": 536, "gradient_accumulation_steps": 2}),
    ],
)
def test_two_processes_equal_one(tmp_path, model, options):
    """With a last step of one row, which one process has alone; 60 users, and 120 rows of evaluation."""
    one, alone = run(tmp_path / "one", 1, model, **options)
    two, together = run(tmp_path / "two", 2, model, **options)
    assert one.keys() == two.keys()
    assert two == pytest.approx(one, abs=1e-6)
    assert together.info["training"]["global_step"] == alone.info["training"]["global_step"]
    for name, tensor in alone.tensors.items():
        if name.startswith("model."):
            torch.testing.assert_close(together.tensors[name], tensor, rtol=1e-3, atol=2e-4)
    assert any(name.startswith("rng.1.") for name in together.tensors)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_choose_one_batch_size_and_go_on_in_mid_growth(tmp_path):
    """As near to one process as the estimates of other chunks are; killed while the batch grows, and gone on with."""
    shared = {"adaptive_batch": "norm_test", "train_batch_size": 16, "checkpoint_steps": 2}
    shared["adaptive_batch_args"] = {"theta": 0.2, "every": 2, "patience": 3, "batch_max": 256, "memory_size": 50}
    _, alone = run(tmp_path / "one", 1, "2Mamba4Rec", **shared)
    _, together = run(tmp_path / "two", 2, "2Mamba4Rec", **shared)
    paths = [[row[1] for row in found.info["training"]["adaptive"]["rows"]] for found in (alone, together)]
    assert all(path[0] == 16 and max(path) > 64 for path in paths)
    assert all(size % 2 == 0 for size in paths[1])
    sigmas = [found.info["training"]["adaptive"]["rows"][0][3] for found in (alone, together)]
    assert sigmas[1] == pytest.approx(sigmas[0], rel=0.5)

    middle = next(row[0] for row in together.info["training"]["adaptive"]["rows"] if row[1] > 16)
    run(tmp_path / "three", 2, "2Mamba4Rec", killed=True, kill_at=middle + 4, **shared)
    folder = next((tmp_path / "three" / "saved").iterdir())
    stopped = checkpoint.newest(folder)[1].info["training"]
    assert middle <= stopped["global_step"] < together.info["training"]["global_step"]
    assert stopped["adaptive"]["sizes"]["batch_size"] < max(paths[1])
    _, resumed = run(tmp_path / "three", 2, "2Mamba4Rec", resume=str(folder))
    assert resumed.info["training"]["adaptive"] == together.info["training"]["adaptive"]
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in together.tensors.items())
