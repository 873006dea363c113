"""Models by data sets in one table: quality over seeds with paired tests, latency, parameters, seconds and memory.

What is missing is trained, one run after the other, seeds in the outer loop: the table is written anew after every run,
so it is balanced at any moment. Stop it as you like; the same command goes on. Options for one model or data set alone
look like --SASRec.n_layers=1 or --ml-1m.epochs=10; a model's own win.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recbole_ssm.config import PROPERTIES, SSMConfig
from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.model import get_model
from recbole_ssm.study import report
from recbole_ssm.study.report import Entry
from recbole_ssm.study.runs import NOT_CACHED, Outcome, Run, Runs
from recbole_ssm.study.speed import speeds

MODELS = "SASRec,GRU4Rec,Mamba4Rec,2Mamba4Rec,Hydra4Rec"
FIRST_SEED = 2020


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    parser.add_argument("--models", default=MODELS, help=f"comma-separated; default {MODELS}")
    parser.add_argument("--datasets", default="ml-100k", help="comma-separated; default ml-100k, which comes along")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each; seeds from --seed=2020 on; default 5")
    parser.add_argument(
        "--tune",
        type=int,
        default=0,
        metavar="N",
        help="first try N settings of each model's search space (properties/hyper), its defaults the first of them, on "
        "the first seed; the best by validation runs on all seeds. Default 0: the defaults",
    )


def run(options: argparse.Namespace, keys: dict[str, Any]) -> None:
    """Train what is missing, print the table, and write it to the folder.

    Raises:
        UserError: an unknown name or key, or an impossible value.
    """
    models, datasets = options.models.split(","), options.datasets.split(",")
    if options.seeds < 1 or options.tune < 0:
        raise UserError(f"--seeds must be at least 1 and --tune at least 0, got {options.seeds} and {options.tune}")
    check_names(models, datasets)
    first = keys.pop("seed", FIRST_SEED)
    seeds = list(range(first, first + options.seeds))
    plain, scoped = split_keys(keys, models, datasets)
    runs = Runs(options.folder / "runs", {key: value for key, value in plain.items() if key in NOT_CACHED})
    common = {key: value for key, value in plain.items() if key not in NOT_CACHED}
    chosen = {
        (dataset, model): {**common, **scoped.get(dataset, {}), **scoped.get(model, {})}
        for dataset in datasets
        for model in models
    }
    for (dataset, model), own in chosen.items():
        SSMConfig(model, dataset, config_dict={**runs.machine_options, **own})  # a mistake is told before hours pass
    tuning = "none; every model has its defaults and what the command gives"
    if options.tune:
        chosen = tuned(runs, chosen, options.tune, first)
        tuning = (
            f"{options.tune} settings of each model's own search space on each data set, the defaults among them, by "
            f"validation with seed {first}"
        )
    compare(runs, options.folder, chosen, seeds, tuning)


def compare(
    runs: Runs, folder: Path, chosen: Mapping[tuple[str, str], Mapping[str, Any]], seeds: Sequence[int], tuning: str
) -> list[Entry]:
    """Run every (data set, model) of ``chosen`` with its options on every seed; print and write the table."""
    todo = [Run(model, dataset, {**own, "seed": seed}) for seed in seeds for (dataset, model), own in chosen.items()]
    measured = speeds(runs, todo[: len(chosen)])
    entries = {
        key: Entry(*key, outcomes=[], settings=settings(runs, one), speed=speed, seeds=len(seeds))
        for key, one, speed in zip(chosen, todo, measured)
    }

    def after(outcomes: list[Outcome]) -> None:
        outcome = outcomes[-1]
        entries[outcome.run.dataset, outcome.run.model].outcomes.append(outcome)
        report.write(folder, "compare", list(entries.values()), seeds, tuning)

    runs.all(todo, after)
    print(report.write(folder, "compare", list(entries.values()), seeds, tuning))
    print(f"written to {folder}/: compare.md, compare.csv, compare-tests.csv, compare.tex")
    return list(entries.values())


def tuned(
    runs: Runs, chosen: Mapping[tuple[str, str], Mapping[str, Any]], settings: int, seed: int
) -> dict[tuple[str, str], dict[str, Any]]:
    """The best of so many settings for each (data set, model), by the validation of one seed.

    Raises:
        UserError: a model has no search space.
    """
    tried: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, own in chosen.items():
        tried[key] = [dict(own), *({**own, **found} for found in samples(key[1], settings - 1, seed))]
    todo = [
        Run(model, dataset, {**options[number], "seed": seed})
        for number in range(settings)
        for (dataset, model), options in tried.items()
    ]
    outcomes = runs.all(todo)
    best = {}
    for place, (key, options) in enumerate(tried.items()):
        mine = outcomes[place :: len(tried)]
        best[key] = max(zip(mine, options), key=partial(_by_validation, runs))[1]
    return best


def samples(model: str, count: int, seed: int) -> list[dict[str, Any]]:
    """So many points of a model's search space, at random and each once.

    Raises:
        UserError: the model has none, or it is smaller.
    """
    from recbole_ssm.study.search import Search, Trial, read_space

    search = Search("random", read_space(PROPERTIES / "hyper" / f"{model}.hyper"), seed)
    trials: list[Trial] = []
    while len(trials) < count:
        params = search.propose(trials, bigger=True)
        if params is None:
            raise UserError(f"--tune: the search space of {model} has {len(trials)} points; take {len(trials) + 1}")
        trials.append(Trial(len(trials), params))
    return [trial.params for trial in trials]


def _by_validation(runs: Runs, tried: tuple[Outcome, Any]) -> float:
    outcome = tried[0]
    if outcome.error is not None:
        return -np.inf
    run = outcome.run
    config = SSMConfig(run.model, run.dataset, config_dict={**runs.machine_options, **run.options})
    score = outcome.valid[config["valid_metric"].lower()]
    return score if config["valid_metric_bigger"] else -score


def settings(runs: Runs, one: Run) -> dict[str, Any]:
    """A run's resolved configuration; empty where there is none."""
    try:
        return {key: value for key, value in runs.content(one)["settings"].items() if key != "seed"}
    except UserError:
        return {}


def check_names(models: Sequence[str], datasets: Sequence[str]) -> None:
    """Refuse unknown models, and names that stand twice."""
    for option, names in (("--models", models), ("--datasets", datasets)):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{option}: {twice} stands twice")
    for model in models:
        get_model(model)


def split_keys(
    keys: Mapping[str, Any], models: Sequence[str], datasets: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """``{"epochs": 5, "SASRec.n_layers": 1}`` -> the keys for all, and those of each model or data set.

    Raises:
        UserError: a key is of a model or data set that is not compared, or ``--model`` and ``--dataset`` are given.
    """
    plain: dict[str, Any] = {}
    scoped: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        scope, dot, name = key.rpartition(".")
        if key in ("model", "dataset"):
            raise UserError(f"--{key}: here it is --{key}s, with commas between names")
        if not dot:
            plain[key] = value
        elif scope in (*models, *datasets):
            scoped.setdefault(scope, {})[name] = value
        else:
            hint = did_you_mean(scope, [*models, *datasets])
            raise UserError(f"--{key}: '{scope}' is none of the models and data sets compared{hint}")
    return plain, scoped
