"""Milliseconds of a training step, an evaluation step and a one-event step of our models, beside RecBole's SASRec.

A training step is loss, backward and Adam on one batch of full histories. An evaluation step scores all items for the
batch and takes the ten best. One event of one user goes through all blocks: by ``model.step``, which leaves the state
that it is given, and in place, as a session does. Items and lengths are random, so no data set is needed. The last
columns are the medians of RecBole's SASRec and of ours in this run over the row's own: above 1 is faster.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from recbole_ssm import ops
from recbole_ssm.arguments import add_counts, at_least, some_of
from recbole_ssm.bench import Row
from recbole_ssm.bench.measure import Function, add_device, backends_on, medians
from recbole_ssm.bench.untrained import RECBOLE, model_of_a_step, random_histories
from recbole_ssm.model import STATE_SPACE
from recbole_ssm.serving import Stepper

COMPARED = (RECBOLE, "SASRec", *STATE_SPACE)
# One event is too short for the clock, so many are timed as one call.
EVENTS = 200
CALLS = {"train": 1, "evaluate": 1, "one event": EVENTS, "in place": EVENTS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--models", type=some_of(COMPARED), default=",".join(COMPARED), help="separated by commas")
    parser.add_argument("--items", type=at_least(2), default=12_102, help="in the catalogue, padding included")
    add_counts(
        parser,
        batch_size=(2048, "histories in a batch"),
        length=(50, "items in a history"),
        layers=(1, "of our models; SASRec has RecBole's 2"),
        rounds=(3, "measurements, of which the median counts"),
    )
    add_device(parser)


def run(options: argparse.Namespace) -> list[Row]:
    """Measure; one row a model, backend and kind of step."""
    torch.manual_seed(0)
    items = options.items - 1
    rows = random_histories(options.batch_size, options.length, items, options.device)
    functions: dict[tuple[str, str, str], Function] = {}
    for name in options.models:
        model = model_of_a_step(name, items, options.device, options.length, options.layers)
        backends = [b for b in backends_on(options.device) if b != "reference"] if "SASRec" not in name else [""]
        for backend in backends:
            for kind, function in _functions(model, rows, backend).items():
                functions[name, backend, kind] = function
    seconds: dict[tuple[str, str, str], float] = {}
    for kind, calls in CALLS.items():
        keys = {"|".join(key): key for key in functions if key[2] == kind}
        found = medians({text: functions[key] for text, key in keys.items()}, options.rounds, options.device)
        seconds |= {keys[text]: value / calls for text, value in found.items()}

    def speedup(value: float, other: str, kind: str) -> float | str:
        return seconds[other, "", kind] / value if (other, "", kind) in seconds else ""

    return [
        {
            "model": name,
            "backend": backend,
            "step": kind,
            "B": options.batch_size if CALLS[kind] == 1 else 1,
            "L": options.length,
            "ms": value * 1e3,
            "speedup_over_recbole": speedup(value, RECBOLE, kind),
            "speedup_over_sasrec": speedup(value, "SASRec", kind),
        }
        for (name, backend, kind), value in seconds.items()
    ]


def _functions(model: Any, rows: Any, backend: str) -> dict[str, Function]:
    """What is timed of one model on one backend, by kind."""
    optimizer = torch.optim.Adam(model.parameters())

    def train() -> None:
        optimizer.zero_grad()
        model.calculate_loss(rows).backward()
        optimizer.step()

    def evaluate() -> None:
        model.full_sort_predict(rows).topk(min(10, model.n_items))

    functions: dict[str, Function] = {"train": train, "evaluate": evaluate}
    if getattr(model, "carries_state", False):
        item = rows["item_id_list"][:1, 0]
        ids, state = item.tolist(), model.alloc_state(1)
        with ops.use_backend(backend):
            stepper = Stepper(model.eval(), state)

        def one_event() -> None:
            for _ in range(EVENTS):
                model.step(item, state)

        def in_place() -> None:
            for _ in range(EVENTS):
                stepper(ids)

        functions |= {"one event": one_event, "in place": in_place}

    def run(kind: str) -> None:
        model.train(kind == "train")
        with ops.use_backend(backend or "auto"), torch.inference_mode(kind != "train"):
            functions[kind]()

    return {kind: partial(run, kind) for kind in functions}
