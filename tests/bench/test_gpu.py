"""The benchmark of a GPU, as far as it can be tried without one."""

import re
import sys
from types import ModuleType

import pytest
import torch

from recbole_ssm import ops
from recbole_ssm.bench import gpu, gpu_checks, gpu_work
from recbole_ssm.cli import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(capsys):
    assert main(["bench", "gpu"]) == 2
    assert "bench gpu: PyTorch finds no GPU here" in capsys.readouterr().err


def made(case, what, **values):
    return gpu_work.row(case, what, **values)


def verdicts(rows):
    return {row["what"]: row["note"].split(":")[0].split(";")[0] for row in gpu._goals(rows)}


def test_goals_are_met_missed_or_not_measured():
    rows = [
        made("step: train 2048 x 50", "Mamba4Rec", speedup=4.0, idle=0.2),
        made("epoch: ml-1m, 2Mamba4Rec, 2048 targets", "2Mamba4Rec", note="1.75 s an epoch of 480 steps"),
        made("op: ssd 2048 x 50 forward", "ours", speedup=2.0),
        made("op: ssd 4 x 16000 forward", "ours", speedup=1 / 24),
    ]
    found = verdicts(rows)
    assert found["Mamba4Rec's training step over RecBole SASRec's"] == "met"
    assert found["idle share of Mamba4Rec's training step"] == "missed"
    assert found["2Mamba4Rec's training step over RecBole SASRec's"] == "not measured"
    assert found["seconds of an ml-1m epoch of 2Mamba4Rec, 2048 targets a step"] == "met"
    assert found["ssd: worst wall time over the fastest rival's"] == "missed"
    assert found["selective_scan: worst wall time over the fastest rival's"] == "not measured"
    assert found["every check passes"] == "not measured"


def test_checks_that_did_not_run_are_no_goal_that_is_met():
    late = "not measured: the 6 minutes were over"
    rows = [
        made("check: numerics", "ssd", note="ok: largest error 1.0e-06, 0.1 s"),
        made("check: CUDA graphs", "", note=late),
    ]
    (goal,) = [row["note"] for row in gpu._goals(rows) if row["what"] == "every check passes"]
    assert goal == "not measured: check: CUDA graphs, check: training"
    assert verdicts([made(case, "", note="ok: error 0.0") for case in gpu.CHECKS])["every check passes"] == "met"


def test_a_replayed_step_stands_beside_the_launched_one(monkeypatch):
    """Both take two epochs before they are measured."""
    taken = []

    def training_step(name, dataset, batch, device, **keys):
        return lambda: taken.append(keys["cuda_graphs"]), 3

    times = iter([8.0, 2.0])
    monkeypatch.setattr(gpu, "training_step", training_step)
    monkeypatch.setattr(gpu, "measure", lambda step, rounds: gpu_work.Work(next(times), 1.9, 1, 0, 5.0))
    launched, replayed = gpu._replayed("Mamba4Rec", 3)
    assert taken == [False] * 6 + ["auto"] * 6
    assert replayed["what"] == "Mamba4Rec, replayed" and replayed["speedup"] == 4 and launched["speedup"] == ""
    found = verdicts([launched, replayed])
    assert found["idle share of Mamba4Rec's replayed training step"] == "met"
    assert found["idle share of 2Mamba4Rec's replayed training step"] == "not measured"


def simple_gla(q, k, v, g, scale=None):
    """What flash-linear-attention documents of its chunk_simple_gla: S_t = e^g_t S_{t-1} + k_t v_t^T, o_t = q_t S_t."""
    state, out = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append((q[:, t, :, :, None] * state).sum(-2) * (scale or q.shape[-1] ** -0.5))
    return torch.stack(out, 1), None


def test_flash_linear_attention_computes_the_same_as_ssd(monkeypatch):
    """Values and gradients, of heads that share maps; on a stand-in, because it needs a GPU."""
    monkeypatch.setitem(sys.modules, "fla", None)
    assert "flash-linear-attention" not in gpu.rivals("ssd")
    for name in ("fla", "fla.ops", "fla.ops.simple_gla"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["fla.ops.simple_gla"], "chunk_simple_gla", simple_gla, raising=False)
    theirs = gpu.rivals("ssd")["flash-linear-attention"]
    torch.manual_seed(0)
    B, L, H, G, P, N = 2, 7, 4, 2, 3, 5
    sizes = [(B, L, H, P), (B, L, H), (H,), (B, L, G, N), (B, L, G, N), (H,)]
    x, dt, A, *rest = (torch.randn(size, dtype=torch.float64).requires_grad_() for size in sizes)
    tensors = [x, dt, A.detach().abs().neg().requires_grad_(), *rest]
    expected, _ = ops.ssd(*tensors, dt_softplus=True)
    found = theirs(*tensors)
    gradient = torch.randn_like(found)
    for f, e in zip(
        (found, *torch.autograd.grad(found, tensors, gradient)),
        (expected, *torch.autograd.grad(expected, tensors, gradient)),
    ):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)
    assert (
        theirs(*[t.detach().bfloat16() if t.dim() > 2 else t.detach().float() for t in tensors]).dtype == torch.bfloat16
    )


@pytest.mark.parametrize("note", ["FAILED: largest error 1.0e+00", "failed: RuntimeError: no kernel"])
def test_a_failed_check_is_a_missed_goal(note):
    assert verdicts([made("check: numerics", "ssd", note=note)])["every check passes"] == "missed"


@pytest.fixture
def here(monkeypatch):
    """The benchmark on the CPU, where a call is made once and not measured."""

    def small(name, batch, layers=1):
        return gpu_work.model_and_batch(name, min(batch, 8), layers)

    def once(function, rounds):
        function()
        return gpu_work.Work(1.0, 1.0, 1, 0, 0.0)

    for module in (gpu, gpu_checks, gpu_work):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for module in (gpu, gpu_checks):
        monkeypatch.setattr(module, "model_and_batch", small)
    monkeypatch.setattr(gpu, "measure", once)
    monkeypatch.setattr(gpu_checks, "COMPARED", ("2Mamba4Rec",))


def test_checks_run(here, monkeypatch):
    """On a CPU, where nothing is recorded, and that is told."""
    monkeypatch.setattr(gpu_checks, "TOLERANCES", {torch.float32: 1e-5})
    rows = [*gpu_checks.check_numerics(), *gpu_checks.check_training()]
    assert len(rows) == len(gpu.CASES) + 1
    assert all(row["note"].startswith("ok: ") for row in rows)
    notes = [row["note"] for row in gpu_checks.check_graphs()]
    assert len(notes) == 3
    assert all(re.match(r"FAILED: recorded False, error (\d.\de-0[5-9]|0.0e\+00)", note) for note in notes), notes


def test_measurements_run(here):
    steps, event, op = gpu._steps(1), gpu._event(1), gpu._op_rows("ssd", (2, 9), 1)
    assert len(steps) == 2 * (1 + len(gpu.COMPARED)) + 1
    assert {row["what"] for row in event} >= {"2Mamba4Rec on cpu, replayed", "Mamba4Rec on cpu"}
    assert verdicts(event)["ms from an event to the ten best"] != "not measured"
    cases = [f"op: ssd 2 x 9 {direction}" for direction in ("forward", "forward+backward")]
    assert [row["case"] for row in op if row["what"] == "ours"] == 2 * cases


def test_a_rival_that_fails_or_computes_something_else_is_told_and_not_compared(here, monkeypatch):
    def fails(*inputs):
        raise RuntimeError("this Triton is too old\nmore")

    ours = gpu.CASES["ssd"](2, 9).call
    monkeypatch.setattr(gpu, "rivals", lambda name: {"one": fails, "two": lambda *x: 2 * ours(*x), "three": ours})
    rows = gpu._op_rows("ssd", (2, 9), 1)
    notes = {row["what"]: row["note"] for row in rows}
    assert notes["one"] == "not measured: RuntimeError: this Triton is too old"
    assert notes["two"] == "not measured: ArithmeticError: its results differ from ours by 1.0e+00 of the largest"
    assert {row["rival"] for row in rows if row["what"] == "ours"} == {"three"}
    assert verdicts(rows)["every check passes"] == "not measured"


def test_every_row_has_the_same_columns():
    work = gpu_work.Work(2.0, 1.5, 30, 1, 5.0)
    rows = gpu_work.compared("step", {"theirs": work, "ours": work._replace(wall_ms=1.0)}, "theirs")
    assert [tuple(row) for row in rows] == [(*gpu_work.COLUMNS,)] * 2
    assert rows[1]["speedup"] == 2 and rows[0]["speedup"] == ""
    assert rows[0]["idle"] == 0.25


@pytest.mark.parametrize("name", gpu.MEASURED_OPS)
def test_the_numbers_of_a_check_fit_every_precision(name):
    """On the CPU each op passes the check that the GPU has to pass."""
    case = gpu.CASES[name](2, 9)
    expected = gpu_checks._value_and_gradients(case, torch.float64, "cpu", "reference")
    found = gpu_checks._value_and_gradients(case, torch.float32, "cpu", "torch")
    assert max(gpu_work.error_of(f, e) for f, e in zip(found, expected)) < 1e-5
