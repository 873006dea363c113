"""What this package does on a GPU, checked and measured by one command that ends in time.

    recbole-ssm bench gpu [--minutes=6] [--data_path=FOLDER] --json=FILE

First come checks: every op in every precision against a float64 reference on the CPU, what serving replays as CUDA
graphs, and training on the GPU against training on the CPU. Then come measurements, the most telling ones first, each
beside its rival in the same run. The last rows are the goals that we set ourselves for an H200, each met, missed, or
not measured. What the minutes did not suffice for is a row that says so.

``wall_ms`` is the median time of one call until the GPU has finished it. ``gpu_ms`` is the time in which the GPU was
at work during one call, as PyTorch's profiler sees it, ``launches`` counts what was sent to it, and ``waits`` how often
Python waited for it. ``idle`` is the share of the wall time in which the GPU did nothing. ``speedup`` is the rival's
wall time over the row's own: above 1 is faster.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.arguments import add_counts
from recbole_ssm.bench import Row
from recbole_ssm.bench.gpu_checks import COMPARED, check_graphs, check_numerics, check_training
from recbole_ssm.bench.gpu_work import (
    DEVICE,
    ITEMS,
    Work,
    compared,
    error_of,
    measure,
    model_and_batch,
    row,
    training_step,
)
from recbole_ssm.bench.ops import CASES
from recbole_ssm.bench.untrained import RECBOLE
from recbole_ssm.errors import UserError, first_line
from recbole_ssm.ops.numerics import step_size

SHAPES = ((2048, 50), (256, 200), (64, 2_000), (4, 16_000))
MEASURED_OPS = ("selective_scan", "ssd", "causal_conv1d", "selective_scan_last", "ssd_last", "quasiseparable")
AS_SHIPPED = f"{RECBOLE}, as shipped"
REPLAYED = ("Mamba4Rec", "2Mamba4Rec", "SASRec")
CHECKS = {
    "check: numerics": check_numerics,
    "check: CUDA graphs": check_graphs,
    "check: training": check_training,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--data_path", default="dataset/", help="folder of data sets; epochs are timed on its ml-1m")
    add_counts(
        parser,
        minutes=(6, "no row is begun after so many"),
        rounds=(9, "calls of which the median is taken"),
    )


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Check, measure, and compare with the goals; one row each.

    Raises:
        UserError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("bench gpu: PyTorch finds no GPU here; the CPU is measured by bench step, ops and train")
    if torch.is_anomaly_enabled():
        raise UserError("bench gpu: autograd's anomaly detection is on, which slows all steps; switch it off")
    end = time.monotonic() + 60 * options.minutes
    print(f"{torch.cuda.get_device_name(0)}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    rows: list[Row] = []
    for name, job in _jobs(options):
        found = _found(name, job, options.minutes, end)
        rows += found
        yield from found
    yield from _goals(rows)


def _found(name: str, job: Callable[[], list[Row]], minutes: float, end: float) -> list[Row]:
    """The rows of one job; where it fails, or begins too late, one row that says so."""
    begin = time.monotonic()
    if begin > end:
        return [row(name, "", note=f"not measured: the {minutes:g} minutes were over")]
    try:
        return job()
    except Exception as error:  # one row that fails must not take the others with it
        return [row(name, "", note=f"failed: {first_line(error)}")]
    finally:
        torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)


def _jobs(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """What is to be done, the most telling first."""
    yield from CHECKS.items()
    yield "step", partial(_steps, options.rounds)
    for name in REPLAYED:
        yield f"step: replayed, {name}", partial(_replayed, name, options.rounds)
    for shape, name in itertools.product(SHAPES[:2], MEASURED_OPS[:3]):
        yield f"op: {name} {shape[0]} x {shape[1]}", partial(_op_rows, name, shape, options.rounds)
    yield "event", partial(_event, options.rounds)
    for batch, model in itertools.product((2_048, 16_384), ("2Mamba4Rec", "Mamba4Rec")):
        yield f"epoch: {model}, {batch} targets", partial(_epoch, model, batch, options)
    for shape, name in itertools.product(SHAPES[2:], MEASURED_OPS[:3]):
        yield f"op: {name} {shape[0]} x {shape[1]}", partial(_op_rows, name, shape, options.rounds)
    for shape, name in itertools.product(SHAPES, MEASURED_OPS[3:]):
        yield f"op: {name} {shape[0]} x {shape[1]}", partial(_op_rows, name, shape, options.rounds)


# --- measurements -------------------------------------------------------------------------------------------------


def _steps(rounds: int) -> list[Row]:
    """A training step and an evaluation step of every model at (2048, 50)."""
    training: dict[str, Work] = {}
    evaluation: dict[str, Work] = {}
    for name in (RECBOLE, *COMPARED):
        model, batch = model_and_batch(name, 2048)
        optimizer = torch.optim.Adam(model.parameters())

        def train(model: Any = model, batch: Any = batch, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            model.calculate_loss(batch).backward()
            optimizer.step()

        @torch.inference_mode()
        def evaluate(model: Any = model, batch: Any = batch) -> None:
            model.full_sort_predict(batch).topk(10)

        model.train()
        training[name] = measure(train, rounds)
        if name == RECBOLE:
            with torch.autograd.set_detect_anomaly(True):
                training[AS_SHIPPED] = measure(train, rounds)
        model.eval()
        evaluation[name] = measure(evaluate, rounds)
    return [
        *compared("step: train 2048 x 50", training, RECBOLE),
        *compared("step: evaluate 2048 x 50", evaluation, RECBOLE),
    ]


def _replayed(name: str, rounds: int) -> list[Row]:
    """A step of our trainer on packed histories, replayed as a CUDA graph, beside one launched kernel by kernel."""
    works = {}
    for what, choice in (("launched", False), ("replayed", "auto")):
        step, steps = training_step(name, "ml-100k", 2048, DEVICE, train_mode="packed", cuda_graphs=choice)
        # In the first epoch sizes are met, in the second all that come again are recorded.
        for _ in range(2 * steps):
            step()
        works[f"{name}, {what}"] = measure(step, rounds)
    return compared("step: packed, 2,048 targets of ml-100k", works, f"{name}, launched")


def _op_rows(name: str, shape: tuple[int, int], rounds: int) -> list[Row]:
    """One op at one shape in float32 and bfloat16, forward and forward + backward, beside who else is installed."""
    rows = []
    case = CASES[name](*shape)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.to(DEVICE, dtype if t.dim() > 2 else None).requires_grad_() for t in case.tensors]
        calls = {"ours": case.call, **rivals(name)}
        gradient = torch.randn_like(case.call(*inputs))

        def forward(call: Callable[..., Tensor], inputs: list[Tensor] = inputs) -> None:
            with torch.no_grad():
                call(*inputs)

        def both(call: Callable[..., Tensor], inputs: list[Tensor] = inputs, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(call(*inputs), inputs, gradient)

        for direction, function in (("forward", forward), ("forward+backward", both)):
            title, text = f"op: {name} {shape[0]} x {shape[1]} {direction}", str(dtype).removeprefix("torch.")
            works: dict[str, Work] = {}
            for who, call in calls.items():
                try:
                    if who != "ours":
                        _require_alike(call, case.call, inputs)
                    works[who] = measure(partial(function, call), rounds)
                except Exception as error:
                    if who == "ours":
                        raise
                    rows.append(row(title, who, dtype=text, note=f"not measured: {first_line(error)}"))
            rival = min((w for w in works if w != "ours"), key=lambda w: works[w].wall_ms, default="")
            rows += compared(title, works, rival, text)
    return rows


@torch.no_grad()
def _require_alike(theirs: Callable[..., Tensor], ours: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Make sure that what is measured as a rival computes the same, to the precision of halves.

    Raises:
        ArithmeticError: it does not.
    """
    error = error_of(theirs(*inputs).float(), ours(*inputs).float())
    if error >= 0.05:
        raise ArithmeticError(f"its results differ from ours by {error:.1e} of the largest")


def rivals(name: str) -> dict[str, Callable[..., Tensor]]:
    """The same op by other packages, as far as they are installed: mamba-ssm, causal-conv1d, flash-linear-attention."""
    found: dict[str, Callable[..., Tensor]] = {}
    if name == "selective_scan":
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        except ImportError:
            return found

        def scan(
            x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, z: Tensor, bias: Tensor
        ) -> Tensor:
            x, dt, B, C, z = (v.transpose(1, 2).contiguous() for v in (x, dt, B, C, z))
            y: Tensor = selective_scan_fn(x, dt, A, B, C, skip, z, bias, True)
            return y.transpose(1, 2)

        found["mamba-ssm"] = scan
    if name == "ssd":
        with suppress(ImportError):
            from fla.ops.simple_gla import chunk_simple_gla

            found["flash-linear-attention"] = partial(_ssd_as_attention, chunk_simple_gla)
        try:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        except ImportError:
            return found

        def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor) -> Tensor:
            y: Tensor = mamba_chunk_scan_combined(x, dt, A, B, C, 64, D=skip, dt_softplus=True)
            return y

        found["mamba-ssm"] = ssd
    if name == "causal_conv1d":
        try:
            from causal_conv1d import causal_conv1d_fn
        except ImportError:
            return found

        def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y: Tensor = causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")
            return y.transpose(1, 2)

        found["causal-conv1d"] = conv
    return found


def _ssd_as_attention(
    attention: Callable[..., Any], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor
) -> Tensor:
    """SSD by linear attention with one gate a head: queries C, keys B, values dt x, and gates of logarithm dt A."""
    dt = step_size("ssd", dt, None, softplus=True)
    q, k = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (C, B))
    y, _ = attention(q, k, (dt[..., None] * x).to(x.dtype), dt * A, scale=1.0)
    return torch.add(y, skip[:, None] * x).to(x.dtype)


def _epoch(name: str, batch: int, options: argparse.Namespace) -> list[Row]:
    """Seconds of a packed epoch of ml-1m: a median step of our trainer, times the steps."""
    case = f"epoch: ml-1m, {name}, {batch} targets"
    if not (Path(options.data_path) / "ml-1m" / "ml-1m.inter").is_file():
        return [row(case, name, note=f"not measured: ml-1m is not in {options.data_path}")]
    step, steps = training_step(name, "ml-1m", batch, DEVICE, data_path=options.data_path)
    work = measure(step, options.rounds)
    seconds = work.wall_ms * steps / 1e3
    return [row(case, name, **work.columns(), note=f"{seconds:.2f} s an epoch of {steps} steps")]


def _event(rounds: int) -> list[Row]:
    """One event of one user to the ten best of 12,101 items: on the CPU, and on the GPU launched and replayed."""
    from recbole_ssm.serving import Recommender

    rows = []
    for how, name in itertools.product((f"{DEVICE}, replayed", DEVICE, "cpu"), ("Mamba4Rec", "2Mamba4Rec")):
        device, is_replayed = how.partition(",")[0], "replayed" in how
        model, _ = model_and_batch(name, 1)
        config = {
            "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "item_length",
            "TIME_FIELD": "timestamp", "MAX_ITEM_LIST_LENGTH": 50, "device": torch.device(device), "model": name,
        }  # fmt: skip
        tokens = ["", *map(str, range(1, ITEMS + 1))]
        recommender = Recommender(model.to(device), config, tokens, cuda_graphs=is_replayed)
        session = recommender.session(["1", "2", "3"])

        def event(session: Any = session) -> None:
            session.update("4")
            session.top(10)

        work = measure(event, 10 * rounds)
        rows.append(row("event to top 10 of 12,101", f"{name} on {how}", **work.columns()))
    return rows


# --- goals --------------------------------------------------------------------------------------------------------


def _goals(rows: list[Row]) -> list[Row]:
    """What we want to reach on an H200, and what this run says of it."""

    def find(case: str, what: str, column: str) -> list[Any]:
        return [
            r[column] for r in rows if r["case"].startswith(case) and r["what"].startswith(what) and r[column] != ""
        ]

    goals: list[tuple[str, list[Any], float]] = []
    for name in ("Mamba4Rec", "2Mamba4Rec"):
        ratios = [1 / speedup for speedup in find("step: train", name, "speedup")]
        goals.append((f"{name}'s training step over RecBole SASRec's", ratios, 1 / 3))
        goals.append((f"idle share of {name}'s training step", find("step: train", name, "idle"), 0.15))
        idle = find("step: packed", f"{name}, replayed", "idle")
        goals.append((f"idle share of {name}'s replayed training step", idle, 0.15))
    for batch, seconds in ((2_048, 2.0), (16_384, 0.5)):
        notes = find(f"epoch: ml-1m, 2Mamba4Rec, {batch}", "2Mamba4Rec", "note")
        found = [float(note.split()[0]) for note in notes if note[0].isdigit()]
        goals.append((f"seconds of an ml-1m epoch of 2Mamba4Rec, {batch} targets a step", found, seconds))
    goals.append(
        ("ms from an event to the ten best", find("event", f"2Mamba4Rec on {DEVICE}, replayed", "wall_ms"), 0.1)
    )
    for name in MEASURED_OPS[:3]:
        ratios = [1 / speedup for speedup in find(f"op: {name}", "ours", "speedup")]
        goals.append((f"{name}: worst wall time over the fastest rival's", ratios and [max(ratios)], 1.0))
    out = []
    for text, values, goal in goals:
        if not values:
            out.append(row("goal", text, note=f"not measured; the goal is at most {goal:.3g}"))
            continue
        verdict = "met" if values[0] <= goal else "missed"
        out.append(row("goal", text, note=f"{verdict}: {values[0]:.3g}, the goal is at most {goal:.3g}"))
    failed = [r for r in rows if "FAILED" in str(r["note"]) or str(r["note"]).startswith("failed")]
    passed = {r["case"] for r in rows if str(r["note"]).startswith("ok")}
    lacking = ", ".join(case for case in CHECKS if case not in passed)
    verdict = f"missed: {len(failed)} failed" if failed else f"not measured: {lacking}" if lacking else "met"
    out.append(row("goal", "every check passes", note=verdict))
    return out
