"""What USGM and the measurements of the adaptive batch size cost, in parts of a training step.

The model is 2Mamba4Rec's body with a softmax over the catalogue, on random histories. A step is forward, backward and
Adam's update. Each figure is the median of rounds in which everything is timed once, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from recbole_ssm.bench import Row
from recbole_ssm.errors import UserError
from recbole_ssm.layers import Block, Mamba2
from recbole_ssm.optim import USFGM, USGM, AdaptiveBatchSize, GradientProbe, IterateAverage


class _Body(nn.Module):
    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(items, width)
        mixers = [Mamba2(d_model=width, d_state=32, d_conv=4, expand=2, head_dim=width) for _ in range(2)]
        self.blocks = nn.ModuleList(Block(mixer, width, 0.2, True) for mixer in mixers)

    def forward(self, histories_BL: Tensor) -> Tensor:
        u = self.embedding(histories_BL)
        for block in self.blocks:
            u, _ = block(u)
        return u[:, -1] @ self.embedding.weight.T


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--items", type=int, default=1682, help="size of the catalogue (default ml-100k's 1682)")
    parser.add_argument("--batch", type=int, default=256, help="targets a step (default 256)")
    parser.add_argument("--length", type=int, default=20, help="events of a history (default 20)")
    parser.add_argument("--every", type=int, default=50, help="a step in this many is measured (default 50)")
    parser.add_argument("--chunks", type=int, default=4, help="parts of a measured batch (default 4)")
    parser.add_argument("--rounds", type=int, default=15, help="times that all is measured (default 15)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda ... (default cpu)")


def run(options: argparse.Namespace) -> list[Row]:
    """A row for each update and for a measured step, beside the whole step with Adam."""
    if min(options.items, options.batch, options.length, options.every, options.rounds) < 1 or options.chunks < 2:
        raise UserError("bench optim: --chunks from 2, all other numbers from 1 up")
    try:
        device = torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: '{options.device}' cannot be used ({str(error).splitlines()[0]})") from error
    torch.manual_seed(0)
    model = _Body(options.items, 64).to(device)
    histories = torch.randint(options.items, (options.batch, options.length), device=device)
    targets = torch.randint(options.items, (options.batch,), device=device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-6)  # so small that the point stays where it is
    updates: dict[str, torch.optim.Optimizer] = {
        "Adam": adam,
        "SGD": torch.optim.SGD(model.parameters(), lr=1e-6),
        "USGM": USGM(model.parameters(), D=1e-3),
        "USGM, averaged": USGM(model.parameters(), D=1e-3),
        "USFGM": USFGM(model.parameters(), D=1e-3),
    }
    IterateAverage(updates["USGM, averaged"])
    probe = GradientProbe(model.parameters())
    sizes = AdaptiveBatchSize(options.batch, every=1, chunks=options.chunks, batch_max=options.batch, D=1.0, budget=1e6)

    def backward(part: slice) -> None:
        share = (part.stop - part.start) / options.batch
        (nn.functional.cross_entropy(model(histories[part]), targets[part]) * share).backward()

    def plain() -> None:
        sizes.accumulate(options.batch, backward, adam.zero_grad)
        adam.step()

    def measured() -> None:
        sizes.accumulate(options.batch, backward, adam.zero_grad, probe)
        measurement = probe.measure()
        adam.step()
        sizes.observe(measurement, probe.change(backward))

    def seconds(work: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in ("step", "measured", *updates)}
    for _ in tqdm(range(options.rounds + 2), desc="rounds", leave=False):
        times["step"].append(seconds(plain))
        times["measured"].append(seconds(measured))
        adam.zero_grad()
        backward(slice(0, options.batch))
        for name, optimizer in updates.items():
            times[name].append(seconds(optimizer.step))
    middle = {name: statistics.median(values[2:]) for name, values in times.items()}  # two rounds to warm up
    rows: list[Row] = [_row(f"update: {name}", middle[name], middle["step"]) for name in updates]
    rows.append(_row("measured step", middle["measured"], middle["step"]))
    extra = (middle["measured"] - middle["step"]) / options.every
    return [*rows, _row(f"measuring 1 step in {options.every}, a step", extra, middle["step"])]


def _row(what: str, seconds: float, step: float) -> Row:
    return {"what": what, "ms": seconds * 1e3, "% of a step": 100 * seconds / step}
