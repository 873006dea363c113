"""What a recommendation costs, of several runs' models side by side."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from recbole_ssm.bench.measure import Function, medians
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.errors import UserError
from recbole_ssm.files import digest_of_json, write_json
from recbole_ssm.llm.model import LanguageModelRecommender
from recbole_ssm.model import get_model
from recbole_ssm.ops import use_backend
from recbole_ssm.quick_start import configure
from recbole_ssm.study.child import machine
from recbole_ssm.study.outcome import Run
from recbole_ssm.study.runs import Runs

# Users in a call where throughput is measured; language models are slow.
BATCH, LANGUAGE_BATCH = 256, 8
TOP_K = 10
# At most so many rounds of each kind of call, and so many seconds.
ROUNDS, SECONDS = 100, 20.0

Speed = dict[str, float]


def speeds(runs: Runs, todo: Sequence[Run]) -> list[Speed | None]:
    """Measure ``p50_s``, the median seconds of a call for one user, and ``users_per_second`` in calls of many.

    Many are 256, for language models 8. A call is encoding, scores of all items and the ten best, of histories of the
    test. The models take turns, so that a slow minute of the machine meets all of them: read the ratios. Their weights
    are random, since times do not depend on them. On one thread of a CPU the time is the processor's, else that of the
    wall. None where a model cannot be built or timed; of the former its run says why. What was measured is kept beside
    the runs, in ``speed-*.json``: delete those to measure again.
    """
    by_dataset = {run.dataset: [other for other in todo if other.dataset == run.dataset] for run in todo}
    found = {dataset: _kept(runs, alike) for dataset, alike in by_dataset.items()}
    return [found[run.dataset][by_dataset[run.dataset].index(run)] for run in todo]


def _kept(runs: Runs, todo: Sequence[Run]) -> list[Speed | None]:
    here = {key: value for key, value in machine().items() if key != "date"}
    here |= {key: runs.machine_options.get(key) for key in ("device", "use_gpu", "gpu_id")}
    try:
        contents = [runs.content(run) for run in todo]
    except UserError:
        # One of them cannot be run.
        return _measure(runs.machine_options, todo)
    if len({content["settings"]["ssm_backend"] for content in contents}) > 1:
        # Up to 0.2.0 all were timed on the backend of the last; those speeds are not read.
        here["ssm_backend"] = "each run's own"
    file = runs.folder / f"speed-{digest_of_json([contents, here])[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    found = _measure(runs.machine_options, todo)
    if all(found):
        write_json(file, found)
    return found


def _measure(machine_options: Mapping[str, Any], todo: Sequence[Run]) -> list[Speed | None]:
    one: dict[str, Function] = {}
    many: dict[str, Function] = {}
    users, device = {}, "cpu"
    for number, run in enumerate(todo):
        try:
            model, rows, backend = _model(machine_options, run)
            call = partial(_call, model, backend)
            call(iter([rows]))
        except Exception:
            # Whatever it is, the run meets it too, and says so in its row.
            continue
        device = next(model.parameters()).device.type
        # Another user in each call, so that the caches hold what they would hold in use.
        turns = itertools.cycle([rows[at : at + 1] for at in range(len(rows))])
        one[str(number)] = partial(call, turns)
        many[str(number)] = partial(call, itertools.repeat(rows))
        users[str(number)] = len(rows)
    p50, batch = medians(one, _rounds(one), device), medians(many, _rounds(many), device)
    return [
        {"p50_s": p50[key], "users_per_second": users[key] / batch[key]} if key in users else None
        for key in map(str, range(len(todo)))
    ]


def _model(machine_options: Mapping[str, Any], run: Run) -> tuple[Any, Any, str]:
    """A run's model on its device with random weights, a batch of its test, and its backend."""
    batch = LANGUAGE_BATCH if issubclass(get_model(run.model), LanguageModelRecommender) else BATCH
    keys = {**machine_options, **run.options, "eval_batch_size": batch, "state": "ERROR", "show_progress": False}
    config = configure(run.model, run.dataset, config_dict=keys)
    # What is to be said of the data stands in the log of the run.
    logging.disable(logging.WARNING)
    try:
        train, _, test = create_loaders(config, create_dataset(config))
    finally:
        logging.disable(logging.NOTSET)
    model = get_model(run.model)(config, train._dataset).to(config["device"]).eval()
    return model, next(iter(test))[0].to(config["device"]), config["ssm_backend"]


@torch.inference_mode()
def _call(model: Any, backend: str, batches: Iterator[Any]) -> None:
    rows = next(batches)
    with use_backend(backend):
        scores = model.full_sort_predict(rows).view(len(rows), -1)
    scores.topk(min(TOP_K, scores.shape[1]))


def _rounds(calls: Mapping[str, Function]) -> int:
    # Kernels are chosen and tested on their first call.
    for call in calls.values():
        call()
    begin = time.perf_counter()
    for call in calls.values():
        call()
    # Each call that is timed follows one that is not.
    once = 2 * (time.perf_counter() - begin)
    return max(3, min(ROUNDS, int(SECONDS / max(once, 1e-9))))
