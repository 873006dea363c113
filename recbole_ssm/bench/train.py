"""Seconds, computed positions and memory of a training epoch, beside RecBole's own SASRec on its own trainer.

Every row runs in a process of its own, one after the other, on the same threads, with the same targets and the same
number of steps an epoch. A step's time is the median over the steps that fit --seconds, after a warm-up, and an epoch
is that times its steps; RecBole's steps on long histories take most of a minute, so few of them are timed. RecBole's
row has autograd anomaly detection off; RecBole as shipped has it on (second row). speedup_over_recbole is the time of
RecBole's first row over the row's own: above 1 is faster.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from recbole_ssm import clock
from recbole_ssm.arguments import add_counts, at_least, each_once, positive, some_of
from recbole_ssm.bench import Row
from recbole_ssm.bench.measure import in_a_process
from recbole_ssm.console import progress_bar
from recbole_ssm.errors import first_line
from recbole_ssm.memory import allocator_settings

RECBOLE, AS_SHIPPED = "RecBole SASRec", "RecBole SASRec, as shipped"
OURS = (
    ("SASRec", "prefix"),
    ("SASRec", "packed"),
    ("Mamba4Rec", "prefix"),
    ("Mamba4Rec", "packed"),
    ("2Mamba4Rec", "prefix"),
    ("2Mamba4Rec", "packed"),
    ("Hydra4Rec", "prefix"),
    ("GRU4Rec", "prefix"),
    ("GRU4Rec", "packed"),
)
MAX_LENGTH = {"ml-1m": 200}  # otherwise 50, RecBole's default
WARM_UP = 2  # steps, if they are quick


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    models = list(dict.fromkeys(model for model, _ in OURS))
    parser.add_argument("--datasets", type=each_once, default="ml-100k", help="separated by commas")
    parser.add_argument("--data_path", default="dataset/", help="folder of data sets")
    parser.add_argument("--length", type=at_least(1), help="events of the longest history; default 50, on ml-1m 200")
    add_counts(parser, batch_size=(2048, "targets of a step"))
    parser.add_argument("--seconds", type=positive, default=20.0, help="time for each row's steps")
    parser.add_argument("--models", type=some_of(models), default=",".join(models), help="beside RecBole's SASRec")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Rows with name, dataset, train_mode, seconds_per_epoch, positions, peak_memory_bytes, speedup_over_recbole.

    A row that could not be measured has the first three alone, and a ``note`` that says why.

    Raises:
        UserError: a data set cannot be read.
    """
    from recbole_ssm.data import create_dataset
    from recbole_ssm.quick_start import configure

    for dataset in options.datasets:
        # What is wrong with it would be wrong in every row.
        create_dataset(configure("SASRec", dataset, config_dict={"data_path": options.data_path, "state": "ERROR"}))
    jobs: list[tuple[str, str]] = [(RECBOLE, "prefix"), (AS_SHIPPED, "prefix")]
    jobs += [(model, mode) for model, mode in OURS if model in options.models]
    with progress_bar(total=len(jobs) * len(options.datasets), desc="bench train", unit="row") as bar:
        for dataset in options.datasets:
            first: Row | None = None
            for name, mode in jobs:
                bar.set_postfix_str(f"{dataset}: {name}, {mode}")
                row: Row = {"name": name, "dataset": dataset, "train_mode": mode}
                try:
                    # As recbole-ssm train starts, and RecBole does not.
                    environment = {} if name in (RECBOLE, AS_SHIPPED) else allocator_settings()
                    row |= in_a_process(_measure, name, dataset, mode, vars(options), environment=environment)
                    if name == RECBOLE:
                        first = row
                    if first:
                        row["speedup_over_recbole"] = first["seconds_per_epoch"] / row["seconds_per_epoch"]
                except Exception as error:  # a row that fails must not take the others with it
                    row["note"] = f"failed: {first_line(error)}"
                yield row
                bar.update()


def _measure(name: str, dataset: str, mode: str, options: dict[str, Any]) -> Row:
    """The measured columns of one row, in this process."""
    from recbole_ssm.memory import peak_memory
    from recbole_ssm.quick_start import configure

    length = options["length"] or MAX_LENGTH.get(dataset, 50)
    theirs = name in (RECBOLE, AS_SHIPPED)
    keys = {
        "data_path": options["data_path"],
        "MAX_ITEM_LIST_LENGTH": length,
        "train_batch_size": options["batch_size"],
        "train_mode": mode,
        "show_progress": False,
    }
    config = configure("SASRec" if theirs else name, dataset, config_dict=keys)
    torch.manual_seed(0)
    step, steps, positions = (_recbole_step if theirs else _our_step)(config)
    with torch.autograd.set_detect_anomaly(name == AS_SHIPPED, check_nan=name == AS_SHIPPED):
        seconds = list(_timed(step, steps, options["seconds"], config["device"]))
    return {
        "seconds_per_epoch": statistics.median(seconds) * steps,
        "positions": positions,
        "peak_memory_bytes": peak_memory(config["device"]),
        "speedup_over_recbole": None,
        "steps": steps,
        "timed_steps": len(seconds),
        "max_length": length,
        "threads": torch.get_num_threads(),
    }


def _timed(step: Callable[[], Any], steps: int, budget: float, device: torch.device) -> Iterator[float]:
    """Seconds of single steps until they sum to the budget, but of two at least; the warm-up, of one step or more, does
    not count.
    """
    warm_up, timed = 0.0, 0
    for number in range(WARM_UP + steps):
        begin = clock.now(device)
        step()
        seconds = clock.now(device) - begin
        if number == 0 or (number < WARM_UP and warm_up + seconds < budget):
            warm_up += seconds
            continue
        yield seconds
        timed += 1
        budget -= seconds
        if budget < 0 and timed > 1:
            return


def _our_step(config: Any) -> tuple[Callable[[], Any], int, int]:
    """A function that takes one step, and the steps and positions of an epoch."""
    from recbole_ssm.data import create_dataset
    from recbole_ssm.data.loader import create_loaders
    from recbole_ssm.model import get_model
    from recbole_ssm.trainer import Trainer

    loader, _, _ = create_loaders(config, create_dataset(config))
    model = get_model(config["model"])(config, loader._dataset).to(config["device"])
    trainer = Trainer(config, model)
    positions = int(loader.plan.work(loader.plan.epoch(np.random.default_rng(0))).sum())
    model.train()
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())
    return lambda: trainer._run_step(next(batches)), len(loader.steps), positions


def _recbole_step(config: Any) -> tuple[Callable[[], Any], int, int]:
    """The same with RecBole's data set, loader, model and trainer."""
    import recbole.trainer
    from recbole.data import data_preparation
    from recbole.data.dataset import SequentialDataset
    from recbole.model.sequential_recommender import SASRec

    loader, _, _ = data_preparation(config, SequentialDataset(config))
    model = SASRec(config, loader._dataset).to(config["device"])
    trainer = recbole.trainer.Trainer(config, model)
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())
    positions = len(loader._dataset) * config["MAX_ITEM_LIST_LENGTH"]
    return lambda: trainer._train_epoch([next(batches)], 0), len(loader), positions
