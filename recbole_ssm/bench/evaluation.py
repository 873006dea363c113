"""Seconds and memory from the vectors of histories to metrics, beside RecBole's: scores, ranks, Hit, NDCG and MRR.

A shape is rows x numbers x items, with random vectors and histories of 100 events. Ours counts the ranks of both
protocols, with the items of the histories and without them; RecBole's collector and evaluator know the first.
speedup_over_recbole is RecBole's median over the row's own: above 1 is faster.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from recbole.evaluator.collector import Collector
from recbole.evaluator.evaluator import Evaluator
from torch import Tensor

from recbole_ssm.arguments import at_least
from recbole_ssm.bench import Row
from recbole_ssm.bench.loss import shapes
from recbole_ssm.bench.measure import Function, extra_memory, medians
from recbole_ssm.data.evaluation import EvalBatch, seen_in
from recbole_ssm.evaluation import metrics
from recbole_ssm.evaluation.ranks import Ranking, Scorer
from recbole_ssm.quick_start import configure

EVENTS = 100


class _Vectors:
    """A model whose histories are encoded already."""

    graphed = None

    def __init__(self, output: Tensor, items: Tensor) -> None:
        self.output, self.items = output, items

    def factors(self, interaction: Any) -> tuple[Tensor, Tensor]:
        """What the scores are products of."""
        return self.output, self.items


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shapes", type=shapes, default="6040x64x3417,4096x64x12102", help="separated by commas")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="measurements, of which the median counts")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Measure; two rows a shape."""
    config = configure("GRU4Rec", "generated", config_dict={"state": "ERROR", "use_gpu": False})
    for n, d, V in options.shapes:
        torch.manual_seed(0)
        target, histories = torch.randint(1, V, (n,)), torch.randint(1, V, (n, EVENTS))
        seen = seen_in(histories.flatten().numpy(), [EVENTS] * n, target.numpy(), V)
        model = _Vectors(torch.randn(n, d), torch.randn(V, d))
        batch = EvalBatch({}, target, torch.full((n,), EVENTS), seen, None, None)
        ways: dict[str, Function] = {
            "recbole": partial(_recboles, config, model, target),
            "ours": partial(_ours, config, model, batch, V),
        }
        seconds = medians(ways, options.rounds, "cpu")
        for way, call in ways.items():
            memory = extra_memory(call, torch.device("cpu"))
            yield {
                "rows": n,
                "numbers": d,
                "items": V,
                "way": way,
                "threads": torch.get_num_threads(),
                "ms": seconds[way] * 1e3,
                "speedup_over_recbole": seconds["recbole"] / seconds[way],
                "MiB": "" if memory is None else memory / 2**20,
                "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else "",
            }


@torch.no_grad()
def _ours(config: Any, model: _Vectors, batch: EvalBatch, V: int) -> None:
    scorer = Scorer(model, SimpleNamespace(item_num=V, iid_field="item_id"), 1)
    rows = batch.target, batch.target, batch.events, *scorer.rank(batch, 0)
    metrics.result(Ranking.of([rows]), config, None)


@torch.no_grad()
def _recboles(config: Any, model: _Vectors, target: Tensor) -> None:
    collector, evaluator = Collector(config), Evaluator(config)
    for first in range(0, len(target), config["eval_batch_size"]):
        rows = slice(first, first + config["eval_batch_size"])
        scores = model.output[rows] @ model.items.T
        scores[:, 0] = -torch.inf
        collector.eval_batch_collect(scores, {}, torch.arange(len(scores)), target[rows])
    evaluator.evaluate(collector.get_data_struct())
