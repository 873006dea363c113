"""What must hold on a GPU before it is measured: numbers, graphs and training equal those of the CPU."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from recbole_ssm import ops
from recbole_ssm.bench import Row
from recbole_ssm.bench.gpu_work import DEVICE, ITEMS, error_of, model_and_batch, row, training_step
from recbole_ssm.bench.ops import CASES, Case
from recbole_ssm.model import STATE_SPACE

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
COMPARED = (*STATE_SPACE, "SASRec")


def check_numerics() -> list[Row]:
    """Every op on the GPU, in every precision that it reads, against float64 on the CPU."""
    rows = []
    for name, make in CASES.items():
        case = make(3, 70)
        expected = _value_and_gradients(case, torch.float64, "cpu", "reference")
        for dtype, tolerance in TOLERANCES.items():
            begin = time.perf_counter()
            found = _value_and_gradients(case, dtype, DEVICE, "auto")
            worst = max(error_of(f, e) for f, e in zip(found, expected))
            verdict = "ok" if worst <= tolerance else "FAILED"
            note = f"{verdict}: largest error {worst:.1e}, {time.perf_counter() - begin:.1f} s with compiling"
            rows.append(row("check: numerics", name, dtype=str(dtype).removeprefix("torch."), note=note))
    return rows


def _value_and_gradients(case: Case, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    inputs = [t.to(device, dtype).requires_grad_() for t in _narrowed(case.tensors)]
    with ops.use_backend(backend):
        value = case.call(*inputs)
        weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape)
        gradients = torch.autograd.grad(value, inputs, weights.to(value.device, value.dtype))
    return [t.detach().double().cpu() for t in (value, *gradients)]


def _narrowed(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers for every precision: such as bfloat16 can hold, so that only the arithmetic differs."""
    return [t.bfloat16().float() for t in tensors]


def check_graphs() -> list[Row]:
    """What is replayed as a graph equals what is launched, and random numbers still come after recording."""
    from recbole_ssm.graphs import Graphed, GraphedModel

    rows = []
    for name in ("Mamba4Rec", "2Mamba4Rec", "Hydra4Rec"):
        model, batch = model_and_batch(name, 8, layers=2)
        model.eval()
        histories, lengths = batch[model.ITEM_SEQ], batch[model.ITEM_SEQ_LEN]
        replays = GraphedModel(model)
        used: list[Graphed] = [replays.scores]
        with torch.inference_mode():
            scores = model.full_sort_predict(batch)
            pairs = [(replays.scores(histories, lengths), scores) for _ in range(2)]
            if replays.step:
                used.append(replays.step)
                state = model.alloc_state(8)
                for items in histories.T[:3]:
                    found, _ = replays.step(items, state)
                    expected, state = model.step(items, state)
                    pairs.append((found, expected))
            output = model.forward(*model.histories_of(batch))
            best, _ = replays.best(output, lengths.new_zeros(8, 1), 10, ITEMS)
            pairs.append((best, scores[:, 1:].topk(10).values.double()))
        torch.rand(1, device=DEVICE)
        error = max(error_of(found, expected) for found, expected in pairs)
        recorded = all(one._recordings for one in (*used, *replays._best.values()))
        verdict = "ok" if recorded and error < 1e-5 else "FAILED"
        rows.append(row("check: CUDA graphs", name, note=f"{verdict}: recorded {recorded}, error {error:.1e}"))
    return rows


def check_training() -> list[Row]:
    """Ten steps without dropout give the same losses on the GPU as on the CPU."""
    rows = []
    for name in COMPARED:
        rates = ("hidden_dropout_prob", "attn_dropout_prob") if name == "SASRec" else ("dropout_prob",)
        undropped: dict[str, Any] = dict.fromkeys(rates, 0.0)
        losses = {}
        for device in ("cpu", DEVICE):
            step, _ = training_step(name, "ml-100k", 256, device, **undropped)
            losses[device] = torch.tensor([sum(step()) for _ in range(10)], dtype=torch.float64)
        error = error_of(losses[DEVICE], losses["cpu"])
        verdict = "ok" if error < 1e-5 else "FAILED"
        note = f"{verdict}: losses of ten steps differ by {error:.1e} of the largest"
        rows.append(row("check: training", name, note=note))
    return rows
