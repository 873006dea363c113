"""Milliseconds of a training step, an evaluation step and a one-event step of our models, beside RecBole's SASRec.

A training step is loss, backward and Adam on one batch of full histories; an evaluation step scores all items for it
and takes the ten best. One event of one user goes through all blocks: by ``model.step``, which leaves the state that it
is given, and in place, as a session does. Items and lengths are made up, so no data set is needed. The last columns are
ratios of medians of this run, to RecBole's SASRec and to ours: below 1 is faster.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recbole_ssm import compat, ops
from recbole_ssm.bench.measure import Function, add_device, backends_on, chosen, device_of, medians
from recbole_ssm.errors import UserError

compat.install()

from recbole.data.interaction import Interaction  # noqa: E402
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec  # noqa: E402

from recbole_ssm.data.outline import DatasetOutline  # noqa: E402
from recbole_ssm.model import get_model  # noqa: E402
from recbole_ssm.quick_start import configure  # noqa: E402
from recbole_ssm.serving import Stepper  # noqa: E402

RECBOLE = "RecBole SASRec"
MODELS = (RECBOLE, "SASRec", "Mamba4Rec", "2Mamba4Rec", "Hydra4Rec")
KINDS = ("train", "evaluate", "one event", "in place")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--models", default=",".join(MODELS), help="which, separated by commas")
    parser.add_argument("--batch", type=int, default=2048, help="histories in a batch")
    parser.add_argument("--length", type=int, default=50, help="items in a history")
    parser.add_argument("--items", type=int, default=12_102, help="in the catalogue, padding included")
    parser.add_argument("--layers", type=int, default=1, help="of our models; SASRec has RecBole's 2")
    parser.add_argument("--rounds", type=int, default=3, help="measurements, of which the median counts")
    add_device(parser)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; one row a model, backend and kind of step."""
    names = chosen("--models", options.models, MODELS)
    if min(options.batch, options.length, options.layers, options.rounds) < 1 or options.items < 2:
        raise UserError("--batch, --length, --layers and --rounds: must be at least 1, and --items at least 2")
    device = device_of(options)
    torch.manual_seed(0)
    functions: dict[tuple[str, str, str], Function] = {}
    for name in names:
        model, rows = _model(name, options)
        backends = [b for b in backends_on(device) if b != "reference"] if "SASRec" not in name else [""]
        for backend in backends:
            functions[name, backend, "train"] = partial(
                _train, model, rows, torch.optim.Adam(model.parameters()), backend
            )
            functions[name, backend, "evaluate"] = partial(_evaluate, model, rows, backend)
            if getattr(model, "carries_state", False):
                for kind, one_event in (("one event", _stepped), ("in place", _in_place)):
                    functions[name, backend, kind] = one_event(model, rows["item_id_list"][:1, 0], backend)
    seconds: dict[tuple[str, str, str], float] = {}
    for kind in KINDS:
        of_kind = {"|".join(key): function for key, function in functions.items() if key[2] == kind}
        found = medians(of_kind, options.rounds, device)
        seconds |= {key: found["|".join(key)] / _calls(kind) for key in functions if key[2] == kind}
    return [
        {
            "model": name,
            "backend": backend,
            "step": kind,
            "B": options.batch if _calls(kind) == 1 else 1,
            "L": options.length,
            "ms": value * 1e3,
            "x_recbole": value / seconds[RECBOLE, "", kind] if (RECBOLE, "", kind) in seconds else "",
            "x_sasrec": value / seconds["SASRec", "", kind] if ("SASRec", "", kind) in seconds else "",
        }
        for (name, backend, kind), value in seconds.items()
    ]


def _model(name: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """A model of its own default sizes, and a batch for it."""
    keys = {"MAX_ITEM_LIST_LENGTH": options.length, "train_neg_sample_args": None, "loss_type": "CE"}
    if "SASRec" not in name:
        keys["num_layers"] = options.layers
    config = configure(name.removeprefix("RecBole "), "ml-100k", config_dict=keys)
    config["device"] = torch.device(options.device)
    model_class = RecBoleSASRec if name == RECBOLE else get_model(name)
    model = model_class(config, DatasetOutline(options.items)).to(options.device)
    items = torch.randint(1, options.items, (options.batch, options.length))
    lengths = torch.full((options.batch,), options.length)
    target = torch.randint(1, options.items, (options.batch,))
    rows = Interaction({"item_id_list": items, "item_length": lengths, "item_id": target})
    return model, rows.to(options.device)


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
        model.full_sort_predict(rows).topk(min(10, model.n_items))


def _calls(kind: str) -> int:
    """How many are timed as one: an event is too short for the clock."""
    return 1 if kind in ("train", "evaluate") else 200


def _stepped(model: Any, item: Tensor, backend: str) -> Function:
    state = model.alloc_state(1)

    @torch.inference_mode()
    def run() -> None:
        model.eval()
        with ops.use_backend(backend):
            for _ in range(_calls("one event")):
                model.step(item, state)

    return run


def _in_place(model: Any, item: Tensor, backend: str) -> Function:
    with ops.use_backend(backend):
        stepper, items = Stepper(model.eval(), model.alloc_state(1)), item.tolist()

    def run() -> None:
        model.eval()
        with ops.use_backend(backend):
            for _ in range(_calls("in place")):
                stepper(items)

    return run
