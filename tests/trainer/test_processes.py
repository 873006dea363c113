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
import json, pathlib, sys
from recbole_ssm import distributed, run_recbole_ssm
model, options = sys.argv[1], json.loads(sys.argv[2])
result = run_recbole_ssm(model, "toy", config_dict=options, resume=options.pop("resume", None))
if distributed.rank() == 0:
    pathlib.Path("result.json").write_text(json.dumps([result["test_result"], result["checkpoint"]]))
"""


def run(folder, processes, model, **options):
    folder.mkdir(exist_ok=True)
    (folder / "main.py").write_text(CODE)
    options |= {"data_path": str(REPOSITORY / "dataset"), "show_progress": False, "topk": [1, 5], "epochs": 3}
    options |= {"metric_decimal_place": 10, "state": "WARNING"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    launcher = [sys.executable] if processes == 1 else [*torchrun, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [*launcher, "main.py", model, json.dumps(options)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
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
    assert sum(name.startswith("rng.1.") for name in together.tensors) == 5
