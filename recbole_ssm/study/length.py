"""Quality and cost by the longest history that a model sees (MAX_ITEM_LIST_LENGTH): state-space models against SASRec.

Every length trains on the same targets in as many steps; only what the model may look back on changes. Each is trained
and measured as by ``recbole-ssm compare``. What histories beyond any data set would cost is measured by
``recbole-ssm bench latency``, on generated ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from recbole_ssm.arguments import sizes
from recbole_ssm.errors import UserError
from recbole_ssm.study import report
from recbole_ssm.study.compare import (
    UNTUNED,
    add_common_arguments,
    add_ties,
    carry_out,
    check_rows,
    fetch,
    label_of,
    plan,
    seeds_of,
)
from recbole_ssm.study.entry import Entry, of_same_targets
from recbole_ssm.study.outcome import Run
from recbole_ssm.study.plots import panels
from recbole_ssm.study.report import Row

KEY = "MAX_ITEM_LIST_LENGTH"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    add_common_arguments(parser, "SASRec,Mamba4Rec,2Mamba4Rec", "ml-1m", 1)
    add_ties(parser)
    parser.add_argument("--lengths", type=sizes, default="50,200,1000", help="comma-separated; default %(default)s")


def run(options: argparse.Namespace, keys: dict[str, Any]) -> str:
    """Train what is missing, and write the table to the folder."""
    for key in keys:
        if key.rpartition(".")[2] == KEY:
            raise UserError(f"--{key}: here it is --lengths, with commas between numbers")
    runs, todo, seeds = plan(options, keys)
    check_rows(runs, todo)
    entries = [
        Entry(
            Run(one.model, one.dataset, {**one.options, KEY: length}),
            f"{label_of(one, options.ties)}, {length}",
            seeds=seeds_of(runs.config(one), seeds),
        )
        for one in todo
        for length in sorted(options.lengths)
    ]
    for entry in entries:
        runs.config(entry.run)
    fetch(runs, todo)

    def write() -> str:
        return report.write(options.folder, "length", entries, seeds, UNTUNED, _one_thing_apart, _draw, height=9)

    carry_out(runs, entries, seeds, write)
    files = "length.md, length.csv, length-tests.csv, length.tex, length.json"
    return report.closing(write(), options.folder, files, "length.png")


def _one_thing_apart(one: Entry, other: Entry) -> bool:
    """Whether two entries of the same ties differ in their model or in their length, but not in both."""
    alike = one.run.model == other.run.model or one.run.options[KEY] == other.run.options[KEY]
    return alike and of_same_targets(one, other)


def _draw(drawn: Any, table: Sequence[Row]) -> None:
    """Draw NDCG@10, seconds an epoch and seconds a user against the length, one column for each data set."""
    shown = (("ndcg", "NDCG@10"), ("seconds_per_epoch", "seconds an epoch"), ("latency_p50_s", "seconds a user"))
    for column, dataset, here in panels(drawn, table, lines=len(shown)):
        for axes, (key, title) in zip(column, shown):
            for model in dict.fromkeys(row["model"].rpartition(", ")[0] for row in here):
                mine = [row for row in here if row["model"].rpartition(", ")[0] == model and row[key] is not None]
                axes.plot([row["max_length"] for row in mine], [row[key] for row in mine], "o-", label=model)
            axes.set(xscale="log", yscale="linear" if key == "ndcg" else "log", ylabel=title)
            lengths = sorted({row["max_length"] for row in here})
            axes.set_xticks(lengths, map(str, lengths))
            axes.set_xticks([], minor=True)
        column[0].set_title(dataset)
        column[0].legend(fontsize="small")
        column[-1].set_xlabel("longest history")
