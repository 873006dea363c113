"""What USGM and the measurements of the adaptive batch size cost, in parts of a training step.

The model is 2Mamba4Rec of its default sizes, on random histories. A step is forward, backward and Adam's update. Each
figure is a median over rounds in which everything is timed once, in turn. Two steps of USFGM are one iteration; its
figure is their mean.
"""

from __future__ import annotations

import argparse

import torch

from recbole_ssm.arguments import add_counts, at_least
from recbole_ssm.bench import Row
from recbole_ssm.bench.measure import Function, add_device, medians
from recbole_ssm.bench.untrained import random_histories, untrained_model
from recbole_ssm.optim import USFGM, USGM, AdaptiveBatchSize, GradientProbe, IterateAverage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add_counts(
        parser,
        items=(1682, "in the catalogue"),
        batch_size=(256, "targets a step"),
        length=(20, "events of a history"),
        every=(50, "a step in this many is measured"),
        rounds=(15, "measurements, of which the median counts"),
    )
    parser.add_argument("--chunks", type=at_least(2), default=4, help="parts of a measured batch")
    add_device(parser)


def run(options: argparse.Namespace) -> list[Row]:
    """A row for each update and for a measured step, beside the whole step with Adam."""
    torch.manual_seed(0)
    model = untrained_model("2Mamba4Rec", options.items, options.device, MAX_ITEM_LIST_LENGTH=options.length).train()
    rows = random_histories(options.batch_size, options.length, options.items, options.device)
    # The rates are so small that the point stays where it is.
    adam = torch.optim.Adam(model.parameters(), lr=1e-6)
    updates: dict[str, torch.optim.Optimizer] = {
        "Adam": adam,
        "SGD": torch.optim.SGD(model.parameters(), lr=1e-6),
        "USGM": USGM(model.parameters(), D=1e-3),
        "USGM, averaged": USGM(model.parameters(), D=1e-3),
        "USFGM": USFGM(model.parameters(), D=1e-3),
    }
    IterateAverage(updates["USGM, averaged"])
    probe = GradientProbe(model.parameters())
    sizes = AdaptiveBatchSize(
        options.batch_size, every=1, chunks=options.chunks, batch_max=options.batch_size, D=1.0, budget=1e6
    )

    def backward(part: slice) -> None:
        share = (part.stop - part.start) / options.batch_size
        (model.calculate_loss(rows[part]) * share).backward()

    def plain() -> None:
        sizes.accumulate(options.batch_size, backward, adam.zero_grad)
        adam.step()

    def measured() -> None:
        sizes.accumulate(options.batch_size, backward, adam.zero_grad, probe)
        measurement = probe.measure()
        adam.step()
        sizes.observe(measurement, probe.change(backward))

    # The step comes last, so that it leaves a gradient to the updates, which are timed alone.
    work: dict[str, Function] = {"measured step": measured, "step": plain}
    work |= {f"update: {name}": optimizer.step for name, optimizer in updates.items()}

    def iteration() -> None:
        updates["USFGM"].step()
        updates["USFGM"].step()

    work["update: USFGM"] = iteration
    seconds = medians(work, options.rounds, options.device)
    seconds["update: USFGM"] /= 2
    step = seconds.pop("step")
    seconds[f"measuring 1 step in {options.every}, a step"] = (seconds["measured step"] - step) / options.every
    return [{"what": what, "ms": value * 1e3, "% of a step": 100 * value / step} for what, value in seconds.items()]
