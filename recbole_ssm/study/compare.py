"""Models by data sets in one table: quality over seeds with paired tests, latency, parameters, seconds and memory.

What is missing is trained, one run after the other, seeds in the outer loop. The table is written after every run, with
all that was done before. Stop it as you like; the same command goes on. Options for one model or one data set look like
--SASRec.n_layers=1 or --ml-1m.epochs=10; a model's own win.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_ssm.arguments import at_least, each_once, some_of
from recbole_ssm.config import Config
from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.model import NEURAL_BASELINES, STATE_SPACE, Pop, get_model
from recbole_ssm.study import asking, report
from recbole_ssm.study.arms import DATASET, read_arms
from recbole_ssm.study.entry import Entry, of_same_targets
from recbole_ssm.study.outcome import Outcome, Run
from recbole_ssm.study.runs import Runs, runs_in
from recbole_ssm.study.space import Search, Trial, read_space, shipped_space
from recbole_ssm.study.speed import speeds

FIRST_SEED = 2020
UNTUNED = "none; every model has its defaults and what the command gives"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    add_common_arguments(parser, ",".join([*NEURAL_BASELINES, *STATE_SPACE]), DATASET, 5)
    # The presets of --arms name data sets too.
    parser.set_defaults(datasets=None)
    add_ties(parser)
    what = "a YAML file of rows by name, each with its config keys, in place of --models (recbole_ssm.study.arms)"
    parser.add_argument("--arms", type=Path, metavar="FILE", help=what)
    parser.add_argument(
        "--tune",
        type=at_least(0),
        default=0,
        metavar="N",
        help="first try N settings of each model's search space (properties/hyper), its defaults the first of them, on "
        "the first seed; the best by validation runs on all seeds. Default 0: the defaults. To search longer for one "
        "model there is recbole-ssm tune",
    )


def run(options: argparse.Namespace, keys: dict[str, Any]) -> str:
    """Train what is missing, and write the table to the folder."""
    if options.arms:
        runs, entries, seeds = plan_arms(options, keys)
    else:
        options.datasets = options.datasets or [DATASET]
        runs, todo, seeds = plan(options, keys)
        entries = [Entry(one, label_of(one, options.ties), seeds=seeds_of(runs.config(one), seeds)) for one in todo]
    todo = [entry.run for entry in entries]
    check_rows(runs, todo, options.tune > 0)
    fetch(runs, todo)
    tuning = UNTUNED
    if options.tune:
        for entry, best in zip(entries, tuned(runs, todo, options.tune, seeds[0])):
            entry.run = best
        tuning = (
            f"{options.tune} settings of each model's own search space on each data set, the defaults among them, by "
            f"validation with seed {seeds[0]}"
        )

    def write() -> str:
        compared, more = of_same_targets, asking.tables
        return report.write(options.folder, "compare", entries, seeds, tuning, compared, more=more)

    carry_out(runs, entries, seeds, write)
    files = "compare.md, compare.csv, compare-tests.csv, compare.tex, compare.json"
    return report.closing(write(), options.folder, files, "compare.png")


def add_common_arguments(parser: argparse.ArgumentParser, models: str, datasets: str, seeds: int) -> None:
    """The options that say what is trained: ``--models``, ``--datasets`` and ``--seeds``."""
    parser.add_argument("--models", type=each_once, default=models, help=f"comma-separated; default {models}")
    bundled = ", which comes along" if datasets == "ml-100k" else ""
    what = f"comma-separated; default {datasets}{bundled}"
    parser.add_argument("--datasets", type=each_once, default=datasets, help=what)
    what = f"runs of each, but one of a model that learns nothing; seeds from --seed={FIRST_SEED} on; default {seeds}"
    parser.add_argument("--seeds", type=at_least(1), default=seeds, help=what)


def add_ties(parser: argparse.ArgumentParser) -> None:
    """The option ``--ties``, by which every run has an arm for each order of events of one time."""
    what = "orders of a user's events of one time, an arm each: file,random; default: file alone"
    parser.add_argument("--ties", type=some_of(("file", "random")), help=what)


def plan(options: argparse.Namespace, keys: Mapping[str, Any]) -> tuple[Runs, list[Run], list[int]]:
    """``--models``, ``--datasets``, ``--ties``, ``--seeds`` and config keys -> the runs' folder, a run for each triple,
    the seeds.
    """
    for model in options.models:
        get_model(model)
    plain, own = split_keys(keys, options.models, options.datasets)
    seeds = seeds_from(plain, options.seeds)
    runs, common = runs_in(options.folder, plain)
    arms = [{"ties": ties} for ties in getattr(options, "ties", None) or ()] or [{}]
    todo = [
        Run(model, dataset, {**common, **own.get(dataset, {}), **own.get(model, {}), **arm})
        for dataset, model, arm in itertools.product(options.datasets, options.models, arms)
    ]
    for one in todo:
        try:
            runs.config(one)
        except UserError as error:
            own_keys = "" if len(options.models) == 1 else " (a key of some models alone is written --MODEL.KEY)"
            raise UserError(f"{one.model}: {error}{own_keys}") from error
    return runs, todo, seeds


def plan_arms(options: argparse.Namespace, keys: Mapping[str, Any]) -> tuple[Runs, list[Entry], list[int]]:
    """``--arms``, ``--datasets``, ``--seeds`` and config keys -> the runs' folder, the table's rows, the seeds."""
    common, _ = split_keys(keys, (), ())
    first = seeds_from(common, 1)[0]
    runs, common = runs_in(options.folder, common)
    if options.ties:
        raise UserError("--ties: each row of --arms says its own, such as ties: [file, random]")
    entries = read_arms(options.arms, common, options.datasets, options.seeds)
    for entry in entries:
        try:
            runs.config(entry.run)
        except UserError as error:
            raise UserError(f"--arms: {entry.label}: {error}") from error
    return runs, entries, list(range(first, first + max(entry.seeds for entry in entries)))


def seeds_of(config: Config, seeds: Sequence[int]) -> int:
    """How many of the seeds a run needs: one where no random numbers are drawn, as every seed gives the same.

    The seed draws the rows of ``eval_rows`` too.
    """
    return 1 if issubclass(config.model_class, Pop) and config["eval_rows"] is None else len(seeds)


def label_of(run: Run, ties: Sequence[str] | None) -> str:
    """What a row is called: its model, and its ties where there are arms of several."""
    return f"{run.model}, ties {run.options['ties']}" if ties and len(ties) > 1 else run.model


def check_rows(runs: Runs, todo: Sequence[Run], tune: bool = False) -> None:
    """Check that targets are ranked among all items, and that the split leaves rows to test and, where settings are
    chosen by it (``tune``), to validate.

    Raises:
        UserError: one is not so.
    """
    for one in todo:
        arguments = runs.config(one)["eval_args"]
        if arguments["mode"]["test"] != "full":
            raise UserError("eval_args: models are compared by ranks among all items; take mode: full")
        for way, parts in (arguments["split"] or {}).items():
            said = f"split: {arguments['split']} leaves no rows"
            if parts == "valid_only" if way == "LS" else not parts[-1]:
                raise UserError(f"eval_args: {said} to test, by which models are compared")
            if tune and (parts == "test_only" if way == "LS" else not parts[-2]):
                raise UserError(f"eval_args: {said} for validation, by which settings are chosen")


def fetch(runs: Runs, todo: Sequence[Run]) -> None:
    """Download the data sets that are not there, so that a name that is none is told before anything is done.

    Raises:
        UserError: one cannot be found.
    """
    for one in {one.dataset: one for one in todo}.values():
        runs.fetch(one)


def seeds_from(keys: dict[str, Any], count: int) -> list[int]:
    """So many seeds from the key ``seed`` on, which is removed from ``keys``.

    Raises:
        UserError: that is none.
    """
    first = keys.pop("seed", FIRST_SEED)
    if type(first) is not int or first < 0:
        raise UserError(f"seed: must be a whole number from 0 up, the first of the seeds, got {first!r}")
    return list(range(first, first + count))


def split_keys(
    keys: Mapping[str, Any], models: Sequence[str], datasets: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """``{"epochs": 5, "SASRec.n_layers": 1}`` -> the keys for all, and those of each model or data set.

    Raises:
        UserError: a key is of a model or data set that is not compared, or a seed of its own; or ``--model`` or
            ``--dataset`` is given.
    """
    plain: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        scope, dot, name = key.rpartition(".")
        if key in ("model", "dataset"):
            raise UserError(f"--{key}: here it is --{key}s, with commas between names")
        if not dot:
            plain[key] = value
        elif name == "seed":
            raise UserError(f"--{key}: all are compared on the same seeds; set --seed")
        elif scope in (*models, *datasets):
            own.setdefault(scope, {})[name] = value
        else:
            hint = did_you_mean(scope, [*models, *datasets])
            raise UserError(f"--{key}: '{scope}' is none of the models and data sets compared{hint}")
    return plain, own


def carry_out(runs: Runs, entries: Sequence[Entry], seeds: Sequence[int], write: Callable[[], object]) -> None:
    """Measure the entries' speed, then run each on as many seeds as it has, seeds in the outer loop.

    What is done already is read before what is missing is trained, so that the table has all of it from then on.
    ``write`` is called once after all that was done, and after each run that was missing.
    """
    todo = [
        (entry, Run(entry.run.model, entry.run.dataset, {**entry.run.options, "seed": seed}))
        for number, seed in enumerate(seeds)
        for entry in entries
        if number < entry.seeds
    ]
    most = max(entry.seeds for entry in entries)
    on_seeds = f" on {most} seeds; --seeds=1 takes fewer, for a first look" if most > 1 else ""
    print(f"{len(todo)} runs: {len(entries)} rows of the table{on_seeds}", file=sys.stderr)
    for entry, speed in zip(entries, speeds(runs, [entry.run for entry in entries])):
        entry.speed = speed
        try:
            identity = runs.identity(entry.run)
            entry.settings, entry.chosen = identity.content["settings"], identity.chosen
        except UserError:
            # Its runs say why.
            continue
    done: list[tuple[Entry, Run]] = []
    missing: list[tuple[Entry, Run]] = []
    for entry, one in todo:
        (done if runs.is_done(one) else missing).append((entry, one))
    todo = done + missing
    for number, (outcome, (entry, _)) in enumerate(zip(runs.all(one for _, one in todo), todo), 1):
        entry.outcomes.append(outcome)
        entry.outcomes.sort(key=lambda one: seeds.index(one.run.options["seed"]))
        if number >= len(done):
            write()


def tuned(runs: Runs, todo: Sequence[Run], count: int, seed: int) -> list[Run]:
    """The runs with the best of ``count`` settings: their own, and others from their models' search spaces.

    The same number for every model, on one seed, chosen by the best validation score. Nothing of the test is looked at.
    What the command line sets is not tuned.

    Raises:
        UserError: a model has no search space, or a smaller one.
    """
    tried = [
        [
            Run(one.model, one.dataset, {**one.options, **more})
            for more in ({}, *samples(one, count - 1, seed, runs.config(one)))
        ]
        for one in todo
    ]
    # One setting of each run in turn.
    turns = itertools.chain.from_iterable(zip(*tried))
    outcomes = list(runs.all(Run(one.model, one.dataset, {**one.options, "seed": seed}) for one in turns))
    best = []
    for place, settings in enumerate(tried):
        scores = [_validation(runs, outcome) for outcome in outcomes[place :: len(todo)]]
        best.append(settings[scores.index(max(scores))])
    return best


def samples(run: Run, count: int, seed: int, default: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Random points of the search space of a run's model, in the keys that the run does not set, and each once.

    The point of the configuration ``default`` is left out, because it is tried anyway.

    Raises:
        UserError: the model has none, or it is smaller.
    """
    if issubclass(get_model(run.model), Pop):
        # It learns nothing, so that all settings are one.
        return [{}] * count
    path = shipped_space(run.model)
    if path is None:
        raise UserError(f"--tune: no search space ships for {run.model}; leave it out of --models, or do not tune")
    space = read_space(path)
    search = Search("random", {key: values for key, values in space.items() if key not in run.options}, seed)
    trials = [Trial(0, {key: default[key] for key in search.space})]
    while len(trials) <= count:
        params = search.propose(trials, bigger=True)
        if params is None:
            raise UserError(f"--tune: {run.model} has {len(trials)} settings to try; take --tune={len(trials)} at most")
        trials.append(Trial(len(trials), params))
    return [trial.params for trial in trials[1:]]


def _validation(runs: Runs, outcome: Outcome) -> float:
    """A run's best validation score, with a sign by which more is better; minus infinity where the run failed."""
    if outcome.error is not None:
        return -float("inf")
    if not outcome.valid:
        raise UserError("--tune: the split leaves no rows for validation, by which settings are chosen")
    config = runs.config(outcome.run)
    score = outcome.validation(config["valid_metric"])
    return score if config["valid_metric_bigger"] else -score
