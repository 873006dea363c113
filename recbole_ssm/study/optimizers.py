"""Optimisers on the same models: quality over seeds, and what it takes to reach Adam's validation score.

Every optimiser has one number to tune (a learning rate, or USGM's diameter D) and the same count of values for it. Each
value is tried on the first seed; the one with the best validation score runs on all seeds. What is missing is trained,
one run after the other, and the tables are written after each. Stop it as you like; the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_ssm.arguments import each_once
from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.figure import figure
from recbole_ssm.files import write_csv, write_text
from recbole_ssm.study import compare
from recbole_ssm.study.cells import average, grid, mean, spread
from recbole_ssm.study.compare import add_common_arguments
from recbole_ssm.study.outcome import Outcome, Run
from recbole_ssm.study.report import closing, failures, machines
from recbole_ssm.study.runs import Runs

METRICS = ("NDCG@10", "Hit@10", "MRR@10")
Options = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """An optimiser: the name of its one number, that number's values, and the config keys that a value means."""

    number: str
    values: tuple[float, ...]
    options: Callable[[float], Options]


def _learner(name: str, **more: Any) -> Callable[[float], Options]:
    return lambda value: {"learner": name, "learning_rate": value, **more}


def _usgm(learner: str = "usgm", arguments: Mapping[str, Any] | None = None, **more: Any) -> Callable[[float], Options]:
    """USGM by its diameter; ``rho`` fixes the first step's length in parts of it."""
    return lambda D: {"learner": learner, "learner_args": {"D": D, "rho": 0.01, **(arguments or {})}, **more}


def _grouped(D: float) -> Options:
    """D for the item embeddings and D / 3 for all else, about the ratio of their first gradients in 2Mamba4Rec."""
    return {**_usgm()(D / 3), "learner_groups": {"item_embedding*": {"D": D}}}


ADAM_RATES, SGD_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.03, 0.1, 0.3, 1.0, 3.0)
# First steps of 0.1 to 2: on ml-100k those from 1 on may diverge.
DIAMETERS = (10.0, 25.0, 50.0, 100.0, 200.0)
GROUPED_DIAMETERS = (5.0, 10.0, 25.0, 50.0, 100.0)
# The power is ours, and was not tuned.
AVERAGED: Options = {"average_power": 8.0}
ADAPTIVE: Options = {
    "adaptive_batch": "hoelder",
    "adaptive_batch_args": {"batch_min": 32, "batch_max": 4096, "every": 20},
}
OPTIMIZERS = {
    "adam": Method("learning_rate", ADAM_RATES, _learner("adam")),
    "adam-average": Method("learning_rate", ADAM_RATES, _learner("adam", **AVERAGED)),
    "adamw": Method("learning_rate", ADAM_RATES, _learner("adamw", weight_decay=0.01)),
    "sgd": Method("learning_rate", SGD_RATES, _learner("sgd")),
    "sgd-momentum": Method("learning_rate", SGD_RATES, _learner("sgd", learner_args={"momentum": 0.9})),
    "sgd-average": Method("learning_rate", SGD_RATES, _learner("sgd", **AVERAGED)),
    "usgm": Method("D", DIAMETERS, _usgm()),
    "usgm-adaptive": Method("D", DIAMETERS, _usgm(**ADAPTIVE)),
    "usgm-groups": Method("D", GROUPED_DIAMETERS, _grouped),
    "usgm-groups-average": Method("D", GROUPED_DIAMETERS, lambda D: {**_grouped(D), **AVERAGED}),
    "usgm-average": Method("D", DIAMETERS, _usgm(**AVERAGED)),
    "usgm-adaptive-average": Method("D", DIAMETERS, _usgm(**AVERAGED, **ADAPTIVE)),
    "usgm-adagrad": Method("D", DIAMETERS, _usgm(arguments={"rule": "adagrad"})),
    "usfgm": Method("D", DIAMETERS, _usgm("usfgm")),
}
"""By the names of ``--optimizers``. ``usgm-groups`` has an H of its own for the item embeddings, ``...-average``
evaluates the mean of the iterates, the newest weighing most."""
DEFAULT = "adam,adam-average,adamw,sgd,sgd-average,usgm,usgm-adaptive,usgm-groups,usgm-average"


@dataclass
class Cell:
    """One optimiser on one model and data set."""

    base: Run
    """Without the optimiser and the seed."""
    optimizer: str
    bigger: bool
    """Whether more is better of the validation score."""
    tuning: dict[float, Outcome] = field(default_factory=dict)
    value: float | None = None
    """The best one; None until it is known, or where every value failed."""
    outcomes: list[Outcome] = field(default_factory=list)
    """The runs of the best value, one a seed; failed ones too."""

    def run(self, value: float, seed: int) -> Run:
        """The run of one value and seed."""
        options = {**self.base.options, **OPTIMIZERS[self.optimizer].options(value), "seed": seed}
        return Run(self.base.model, self.base.dataset, options)

    @property
    def done(self) -> list[Outcome]:
        """The runs over seeds that succeeded."""
        return [outcome for outcome in self.outcomes if outcome.error is None]

    def best(self, outcome: Outcome) -> float:
        """A run's best validation score, with a sign by which more is better; minus infinity where the run failed."""
        scores = [] if outcome.error else [entry["valid"] for entry in outcome.history if entry["valid"] is not None]
        return max((score if self.bigger else -score for score in scores), default=-float("inf"))

    def choose(self) -> None:
        """Choose the value with the best validation score, the first of equals."""
        scores = {value: self.best(outcome) for value, outcome in self.tuning.items()}
        best = max(scores, key=lambda value: scores[value])
        self.value = best if scores[best] > -float("inf") else None

    def reached(self, target: float) -> list[dict[str, Any]]:
        """The first entry in the history of each run that has a (signed) validation score, where the run gets there."""
        found = []
        for outcome in self.done:
            scored = [entry for entry in outcome.history if entry["valid"] is not None]
            there = [e for e in scored if (e["valid"] if self.bigger else -e["valid"]) >= target]
            found += there[:1]
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    add_common_arguments(parser, "2Mamba4Rec,SASRec,GRU4Rec", "ml-100k", 5)
    what = f"comma-separated, of {', '.join(OPTIMIZERS)}; the first one's score is what the others are to reach. "
    parser.add_argument("--optimizers", type=each_once, default=DEFAULT, help=f"{what}Default {DEFAULT}")
    parser.add_argument("--values", type=int, default=5, help="values that each tries, of its first ones; default 5")


def run(options: argparse.Namespace, keys: dict[str, Any]) -> str:
    """Train what is missing, and write the tables to the folder."""
    runs, cells, seeds = plan(options, keys)
    compare.fetch(runs, [cell.base for cell in cells])

    def write() -> str:
        return write_tables(options.folder, cells, seeds, options.values)

    study(runs, cells, seeds, options.values, write)
    files = "optimizers.md, optimizers.csv, tuning.csv, history.csv"
    return closing(write(), options.folder, files, "plots")


def plan(options: argparse.Namespace, keys: Mapping[str, Any]) -> tuple[Runs, list[Cell], list[int]]:
    """The command line -> the runs' folder, a cell for each optimiser, model and data set, and the seeds."""
    for name in options.optimizers:
        if name not in OPTIMIZERS:
            raise UserError(f"--optimizers: there is no '{name}'{did_you_mean(name, OPTIMIZERS)}")
    most = min(len(method.values) for method in OPTIMIZERS.values())
    if not 1 <= options.values <= most:
        raise UserError(f"--values: from 1 to {most}; got {options.values}")
    varied = {key for method in OPTIMIZERS.values() for key in method.options(1.0)}
    for key in keys:
        if key.rpartition(".")[2] in varied:
            raise UserError(f"--{key.rpartition('.')[2]}: that is what this study varies; leave it out")
    runs, todo, seeds = compare.plan(options, keys)
    compare.check_rows(runs, todo, tune=True)
    cells = [
        Cell(base, optimizer, bool(runs.config(base)["valid_metric_bigger"]))
        for base in todo
        for optimizer in options.optimizers
    ]
    return runs, cells, seeds


def study(runs: Any, cells: Sequence[Cell], seeds: Sequence[int], values: int, write: Callable[[], object]) -> None:
    """Tune every cell on the first seed over so many values, then run it on all seeds; ``write`` after each run."""
    tuning = [(cell, value) for cell in cells for value in OPTIMIZERS[cell.optimizer].values[:values]]
    tuned = runs.all(cell.run(value, seeds[0]) for cell, value in tuning)
    for outcome, (cell, value) in zip(tuned, tuning):
        cell.tuning[value] = outcome
        if len(cell.tuning) == values:
            cell.choose()
        write()
    final = [(cell, cell.value, seed) for seed, cell in itertools.product(seeds, cells) if cell.value is not None]
    for outcome, (cell, *_) in zip(runs.all(cell.run(value, seed) for cell, value, seed in final), final):
        cell.outcomes.append(outcome)
        write()


def rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The table's figures, a row a cell; None where there is none.

    ``valid`` is the best validation score, ``..._sd`` the sample standard deviation over seeds. ``target`` is the mean
    ``valid`` of the first optimiser of that model and data set; ``reached`` counts the seeds that get there, and
    ``targets_seen`` and ``seconds`` are the means over these, at the end of the epoch in which they do.
    """
    found = []
    for cell in cells:
        yardstick = next(c for c in cells if c.base == cell.base)
        goal = average(yardstick.best(outcome) for outcome in yardstick.done)
        reached = [] if goal is None else cell.reached(goal)
        sign, done = 1 if cell.bigger else -1, cell.done
        ends = [outcome.history[-1]["batch_size"] for outcome in done]
        row: dict[str, Any] = {
            **_names(cell),
            "number": OPTIMIZERS[cell.optimizer].number,
            "value": cell.value,
            "at_edge": cell.value in (min(cell.tuning), max(cell.tuning)) if cell.tuning else None,
            "seeds": len(done),
            **spread("valid", [sign * cell.best(outcome) for outcome in done]),
        }
        for name in METRICS:
            row |= spread(name.lower(), [outcome.mean(name) for outcome in done])
        row |= {
            "target": None if goal is None else sign * goal,
            "reached": len(reached),
            "targets_seen": average(entry["targets"] for entry in reached),
            "seconds": average(entry["seconds"] for entry in reached),
            "seconds_in_all": average(outcome.seconds for outcome in done),
            "steps_in_all": average(outcome.history[-1]["steps"] for outcome in done),
            "batch_size_end_least": min(ends, default=None),
            "batch_size_end_most": max(ends, default=None),
            "batch_size_path": " ".join(str(entry["batch_size"]) for entry in done[0].history) if done else None,
            "batch_size_turns": average(map(turns, done)),
            "error": next((o.error for o in (*cell.tuning.values(), *cell.outcomes) if o.error), None),
        }
        found.append(row)
    return found


def turns(outcome: Outcome) -> int:
    """How often the batch size turns from growing to shrinking, or back, from epoch to epoch."""
    sizes = [entry["batch_size"] for entry in outcome.history]
    moves = [after > before for before, after in itertools.pairwise(sizes) if after != before]
    return sum(one != other for one, other in itertools.pairwise(moves))


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    titles = ["data set", "model", "optimiser", "tuned to", "seeds", *METRICS, "validation"]
    titles += ["reach the first's validation", "after samples", "after seconds"]
    titles += ["seconds in all", "steps in all", "batch size by epoch"]
    rows = []
    for row in table:
        edge = ", at the edge" if row["at_edge"] else ""
        tuned = "" if row["value"] is None else f"{row['number']} {row['value']:g}{edge}"
        path = row["batch_size_path"] or ""
        if len(set(path.split())) <= 1:
            path = path.partition(" ")[0]
        elif row["seeds"] > 1:
            ends = f"{row['batch_size_end_least']} to {row['batch_size_end_most']}"
            path += f" (first seed; all end at {ends}, {row['batch_size_turns']:.1f} turns)"
        cells = [row["dataset"], row["model"], row["optimizer"], tuned, str(row["seeds"])]
        cells += [mean(key)(row) for key in (*map(str.lower, METRICS), "valid")]
        cells += [
            f"{row['reached']} of {row['seeds']}" if row["seeds"] else "",
            _count(row["targets_seen"]),
            _count(row["seconds"]),
        ]
        cells += [_count(row["seconds_in_all"]), _count(row["steps_in_all"]), path]
        rows.append(cells)
    return grid(titles, rows) + failures("Failed, and counted as worst:", table, "dataset", "model", "optimizer")


def write_tables(folder: Path, cells: Sequence[Cell], seeds: Sequence[int], values: int) -> str:
    """Write the tables and plots of the runs so far, and return the Markdown.

    ``optimizers.md`` and ``optimizers.csv`` (:func:`rows`), ``tuning.csv`` (each value tried), ``history.csv`` (each
    epoch of each run over seeds), and with Matplotlib ``MODEL-DATASET.png``.
    """
    table = rows(cells)
    text = "\n".join(["## Optimisers\n", markdown(table), "## Protocol\n", protocol(cells, seeds, values)])
    tried = [
        {
            **_names(cell),
            "value": value,
            "valid": None if outcome.error else cell.best(outcome) * (1 if cell.bigger else -1),
        }
        for cell in cells
        for value, outcome in cell.tuning.items()
    ]
    history = [
        {**_names(cell), "value": cell.value, "seed": outcome.run.options["seed"], **entry}
        for cell in cells
        for outcome in cell.done
        for entry in outcome.history
    ]
    write_text(folder / "optimizers.md", text)
    for name, found in (("optimizers", table), ("tuning", tried), ("history", history)):
        write_csv(folder / f"{name}.csv", found)
    for base in {(cell.base.model, cell.base.dataset): None for cell in cells}:
        here = [cell for cell in cells if (cell.base.model, cell.base.dataset) == base and cell.done]
        if here:
            with contextlib.suppress(UserError), figure(folder / f"{'-'.join(base)}.png", (10, 9)) as drawn:
                draw(drawn, here)
    return text


def draw(drawn: Any, cells: Iterable[Cell]) -> None:
    """Draw validation score, batch size and step size against the samples seen.

    An optimiser is the mean of its seeds at the end of each epoch, within a band from the least to the most.
    """
    panels = drawn.subplots(3, sharex=True)
    for number, cell in enumerate(cells):
        # As far as all seeds have come.
        epochs = list(zip(*[outcome.history for outcome in cell.done]))
        for axes, key in zip(panels, ("valid", "batch_size", "step_size")):
            shown = [entries for entries in epochs if all(entry[key] is not None for entry in entries)]
            seen = [statistics.fmean(entry["targets"] for entry in entries) for entries in shown]
            values = [[entry[key] for entry in entries] for entries in shown]
            color, label = f"C{number % 10}", f"{cell.optimizer} ({cell.value:g})"
            axes.fill_between(seen, list(map(min, values)), list(map(max, values)), color=color, alpha=0.12, lw=0)
            axes.plot(seen, list(map(statistics.fmean, values)), "o-", ms=3, color=color, label=label)
    for axes, name in zip(panels, ("validation score", "batch size", "step size or learning rate")):
        axes.set(ylabel=name, yscale="log" if axes is panels[2] else "linear")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    panels[-1].set(xlabel="samples seen")


def protocol(cells: Sequence[Cell], seeds: Sequence[int], values: int) -> str:
    """How the figures came about, in Markdown."""
    lines = [
        f"- Seeds {', '.join(map(str, seeds))}; ± is the sample standard deviation over seeds.",
        f"- Tuning: {values} values of one number for each optimiser, on seed {seeds[0]}, by validation; epochs, batch "
        "size and all else are the same. The tuning seed is one of the seeds.",
    ]
    for name in dict.fromkeys(cell.optimizer for cell in cells):
        method = OPTIMIZERS[name]
        tried = ", ".join(f"{value:g}" for value in method.values[:values])
        first = ", ".join(f"{key} {value}" for key, value in method.options(method.values[0]).items())
        lines.append(f"- {name}: {method.number} of {tried}; the first is {first}")
    for base in {str(cell.base): None for cell in cells}:
        lines.append(f"- {base}")
    lines += machines(outcome for cell in cells for outcome in cell.done if outcome.made)
    return "\n".join(lines) + f"\n{MEANING}"


MEANING = """\
- Ranking is against all items, leave one out unless eval_args says otherwise, events of one time in the order of the
  file unless ties says otherwise; the weights of the best validation are tested.
- The score to be reached is the mean over seeds of the first optimiser's best validation. A run reaches it at the end
  of an epoch; samples and seconds (training alone) are means over the runs that do. Of the first optimiser's own runs
  about half do.
- "At the edge": the best value is the first or last one tried, so a wider grid may do better.
- With other work on the machine read the ratios of seconds.
"""


def _names(cell: Cell) -> dict[str, Any]:
    return {"dataset": cell.base.dataset, "model": cell.base.model, "optimizer": cell.optimizer}


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
