"""Benchmarks that anyone can run again: ``recbole-ssm bench NAME [--json=FILE] [--csv=FILE]``.

A benchmark is one module of this package: ``add_arguments(parser)`` names its options, ``run(options)`` measures and
gives rows as they come (``step`` and ``optim`` all at the end), and ``conclude(options, rows)``, where it has one, says
what follows from them. Times on a shared machine are noise, so a row carries ratios within its own run, of medians.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

from recbole_ssm.arguments import path_that
from recbole_ssm.errors import ArgumentParser
from recbole_ssm.files import check_writable, write_csv, write_json
from recbole_ssm.subcommands import choose

BENCHES = {
    "convex": "the order of convergence of USGM and USFGM on problems whose answer is known",
    "dataset": "memory and seconds of the splits and batches of millions of interactions, beside RecBole",
    "eval": "seconds and memory from vectors to metrics under both protocols, beside RecBole",
    "gpu": "everything that matters on a GPU: checks, steps, ops, epochs and goals, within minutes",
    "latency": "percentiles of a recommendation by model, length, batch and catalogue, and the exponent of the length",
    "llm": "candidates a second of LlamaRec, beside a plain implementation",
    "loss": "milliseconds and memory of the loss over all items and of ranks, beside PyTorch",
    "ops": "milliseconds and memory of every op on every backend, beside what the machine allows",
    "optim": "what USGM and the adaptive batch size cost, in parts of a training step",
    "serve": "calls a second and latencies of the server, an event and its recommendations in each",
    "step": "milliseconds of a training, an evaluation and a one-event step of every model, beside SASRec",
    "train": "seconds, positions and memory of a training epoch, beside RecBole's own SASRec",
}
# Benchmarks whose modules have other names.
MODULES = {"eval": "evaluation", "llm": "verbalizers"}

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Run one benchmark, print its table, and write its rows where ``--json`` and ``--csv`` say.

    Where it fails or is interrupted, the rows before are printed and written all the same.

    Raises:
        UserError: no such benchmark, no such option, or an impossible value.
    """

    def add_files(parser: ArgumentParser, name: str) -> None:
        file = path_that(check_writable)
        parser.add_argument("--json", type=file, metavar="FILE", help="write the rows there as a JSON list")
        parser.add_argument("--csv", type=file, metavar="FILE", help="write the rows there as a table")

    usage = "[--json=FILE] [--csv=FILE]"
    chosen = choose("bench", "benchmark", usage, BENCHES, MODULES, arguments, add_files, with_keys=False)
    if chosen is None:
        return
    module, options, _ = chosen
    rows: list[Row] = []
    try:
        for row in module.run(options):
            rows.append(row)
    except BaseException:
        if rows:
            print(f"the benchmark ended early; {len(rows)} rows were measured:")
            # What fails here must not hide why the benchmark ended.
            with contextlib.suppress(OSError):
                _keep(rows, options)
        raise
    if rows:
        _keep(rows, options)
        if hasattr(module, "conclude"):
            print(module.conclude(options, rows))


def _keep(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Print the rows, and write them where the options say."""
    print(table(rows))
    if options.json:
        write_json(options.json, rows)
    if options.csv:
        write_csv(options.csv, rows)


def table(rows: Sequence[Row]) -> str:
    """The rows as text in aligned columns; every key is a column, in the order of its first use."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys] + [[_text(row.get(key)) for key in keys] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
