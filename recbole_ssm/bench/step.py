"""Milliseconds of a training step, an evaluation step and a one-event step of our models, beside RecBole's SASRec.

A training step is loss, backward and Adam on one batch of full histories; an evaluation step scores all items for it.
Items and lengths are made up, so no data set is needed. x_sasrec is a ratio of medians of this run: below 1 is faster.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recbole_ssm import compat, ops
from recbole_ssm.bench.measure import Function, chosen, medians
from recbole_ssm.errors import UserError
from recbole_ssm.ops.backend import available_backends

compat.install()

from recbole.data.interaction import Interaction  # noqa: E402

from recbole_ssm.config import SSMConfig  # noqa: E402
from recbole_ssm.model import get_model  # noqa: E402

MODELS = ("SASRec", "Mamba4Rec", "2Mamba4Rec", "Hydra4Rec")


class Catalogue:
    """As much of a data set as a sequential model of items alone asks for."""

    def __init__(self, items: int) -> None:
        self.items = items

    def num(self, field: str) -> int:
        """How many tokens a field has, padding included."""
        return self.items


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--models", default=",".join(MODELS), help="which, separated by commas")
    parser.add_argument("--batch", type=int, default=2048, help="histories in a batch")
    parser.add_argument("--length", type=int, default=50, help="items in a history")
    parser.add_argument("--items", type=int, default=12_102, help="in the catalogue, padding included")
    parser.add_argument("--layers", type=int, default=1, help="of our models; SASRec has RecBole's 2")
    parser.add_argument("--rounds", type=int, default=3, help="measurements, of which the median counts")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; one row a model, backend and kind of step."""
    names = chosen("--models", options.models, MODELS)
    if min(options.batch, options.length, options.layers, options.rounds) < 1 or options.items < 2:
        raise UserError("--batch, --length, --layers and --rounds: must be at least 1, and --items at least 2")
    torch.manual_seed(0)
    functions: dict[tuple[str, str, str], Function] = {}
    for name in names:
        model, rows = _model(name, options)
        backends = [b for b in available_backends() if b != "reference"] if name != "SASRec" else [""]
        for backend in backends:
            functions[name, backend, "train"] = partial(
                _train, model, rows, torch.optim.Adam(model.parameters()), backend
            )
            functions[name, backend, "evaluate"] = partial(_evaluate, model, rows, backend)
        if name in ("Mamba4Rec", "2Mamba4Rec"):
            state = model.alloc_state(1)
            functions[name, "", "one event"] = partial(_one_event, model, rows["item_id_list"][:1, 0], state)
    seconds: dict[tuple[str, str, str], float] = {}
    for kind in ("train", "evaluate", "one event"):
        of_kind = {"|".join(key): function for key, function in functions.items() if key[2] == kind}
        found = medians(of_kind, options.rounds if kind != "one event" else 200 * options.rounds)
        seconds |= {key: found["|".join(key)] for key in functions if key[2] == kind}
    return [
        {
            "model": name,
            "backend": backend,
            "step": kind,
            "B": 1 if kind == "one event" else options.batch,
            "L": options.length,
            "ms": value * 1e3,
            "x_sasrec": value / seconds["SASRec", "", kind] if ("SASRec", "", kind) in seconds else "",
        }
        for (name, backend, kind), value in seconds.items()
    ]


def _model(name: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """A model of its own default sizes, and a batch for it."""
    keys = {"MAX_ITEM_LIST_LENGTH": options.length, "train_neg_sample_args": None, "loss_type": "CE"}
    if name != "SASRec":
        keys["num_layers"] = options.layers
    config = SSMConfig(name, "ml-100k", config_dict=keys)
    config["device"] = torch.device("cpu")
    model = get_model(name)(config, Catalogue(options.items))
    items = torch.randint(1, options.items, (options.batch, options.length))
    lengths = torch.full((options.batch,), options.length)
    target = torch.randint(1, options.items, (options.batch,))
    return model, Interaction({"item_id_list": items, "item_length": lengths, "item_id": target})


def _train(model: Any, rows: Any, optimizer: torch.optim.Optimizer, backend: str) -> None:
    model.train()
    with ops.use_backend(backend or "auto"):
        optimizer.zero_grad()
        model.calculate_loss(rows).backward()
        optimizer.step()


@torch.inference_mode()
def _evaluate(model: Any, rows: Any, backend: str) -> None:
    model.eval()
    with ops.use_backend(backend or "auto"):
        model.full_sort_predict(rows)


@torch.inference_mode()
def _one_event(model: Any, item: Tensor, state: Any) -> None:
    model.eval()
    model.step(item, state)
