"""Benchmarks that anyone can run again: ``recbole-ssm bench NAME [--json=FILE]``.

A benchmark is one module of this package: ``add_arguments(parser)`` names its options, ``run(options)`` measures and
returns rows. Times on a shared machine are noise, so a row carries ratios within its own run, of medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from recbole_ssm.errors import UserError, did_you_mean

BENCHES = {
    "train": "seconds, positions and memory of a training epoch, beside RecBole's own SASRec",
    "optim": "what USGM and the adaptive batch size cost, in parts of a training step",
    "convex": "the order of convergence of USGM and USFGM on problems whose answer is known",
}

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Run one benchmark, print its table, and write its rows where ``--json`` says.

    Raises:
        UserError: no such benchmark, no such option, or an impossible value.
    """
    names = "; ".join(f"{name}: {what}" for name, what in BENCHES.items())
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"bench: name one of {names}")
    name = arguments[0]
    if name not in BENCHES:
        raise UserError(f"bench: there is no benchmark '{name}'{did_you_mean(name, BENCHES)}; {names}")
    module = importlib.import_module(f"recbole_ssm.bench.{name}")
    parser = _Parser(prog=f"recbole-ssm bench {name}", description=module.__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as a JSON list")
    module.add_arguments(parser)
    options = parser.parse_args(list(arguments[1:]))
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {options.json.absolute().parent}")
    rows: list[Row] = module.run(options)
    print(table(rows))
    if options.json:
        write_json(options.json, rows)


def table(rows: Sequence[Row]) -> str:
    """The rows as text in aligned columns; a column is a key of the first row."""
    if not rows:
        return "nothing was measured"
    cells = [list(rows[0])] + [[_text(row[key]) for key in rows[0]] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")
