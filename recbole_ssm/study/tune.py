"""The best hyper-parameters, searched as by RecBole's run_hyper.py: ``recbole-ssm tune --model=M --params_file=FILE``.

A parameter file is RecBole's, with lines such as

    learning_rate loguniform -8,-4              natural logarithms of the bounds
    dropout_prob uniform 0.0,0.5
    num_layers quniform 1,4,1                   from 1 to 4 in steps of 1
    loss_type choice ['CE', 'gBCE']             any literals
    gbce_t uniform 0,1 if loss_type == 'gBCE'   a condition on an earlier line; or: if num_layers in [1, 2]
    weight_decay                                values of the table of keys (recbole-ssm keys weight_decay)

A random or a Bayesian search begins with the setting as it is, where the file has its values. Trials are chosen by the
validation score; test metrics stand beside it. The same command goes on where it was stopped, also with more
--max_evals, and runs no trial twice; given several times at once, it shares the trials.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from recbole.utils import dict2str

from recbole_ssm.arguments import at_least, one_of, path_that, read_yaml
from recbole_ssm.config import Config
from recbole_ssm.console import progress_bar
from recbole_ssm.errors import UserError, did_you_mean, require
from recbole_ssm.figure import check_drawable
from recbole_ssm.files import check_writable, write_csv, write_text
from recbole_ssm.quick_start import configure
from recbole_ssm.study.hyper_tuning import HyperTuning, Objective
from recbole_ssm.study.identity import existing, results_of
from recbole_ssm.study.outcome import Run
from recbole_ssm.study.runs import Progress, Runs, ignore
from recbole_ssm.study.space import ALIASES, STARTUP, Space, Trial, optuna, read_space, shipped_space


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of run_hyper.py, and ours."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--params_file", type=Path, metavar="FILE", help="the space; default properties/hyper/MODEL.hyper")
    add("--config_files", default="", metavar="FILES", help="YAML files of what is fixed")
    add("--algo", default="exhaustive", metavar="ALGO", help="exhaustive (default; or grid), random or bayes (or tpe)")
    add("--max_evals", type=at_least(1), metavar="N", help="trials in all; default 100, exhaustive: all points")
    patience = "stop after N trials without progress; default 10, exhaustive: never"
    add("--early_stop", type=at_least(1), metavar="N", help=patience)
    prune = "stop a trial that is behind the median of the others after N validations, 3 where N is not given; "
    prune += "the first five trials run to their end"
    add("--prune", type=at_least(1), nargs="?", const=3, metavar="N", help=prune)
    add("--workers", type=at_least(1), metavar="N", help="trials at a time; default 1, with Ray as many as fit")
    # RecBole calls the tool of one machine Hyperopt.
    tool = one_of(("Optuna", "Hyperopt", "Ray"))
    tools = "Optuna (default) on this machine; Ray on its cluster, or on this machine if there is none"
    add("--tool", type=tool, default="Optuna", metavar="TOOL", help=tools)
    add("--trial_cpus", type=float, default=1, metavar="N", help="Ray: processors of a trial; default 1")
    add("--trial_gpus", type=float, default=0, metavar="N", help="Ray: GPUs of a trial, also parts; default 0")
    file, drawn = path_that(check_writable), path_that(check_drawable)
    add("--output_file", type=file, metavar="FILE", help="also write all results there in RecBole's form")
    add("--display_file", type=drawn, metavar="FILE", help="draw the plot there; default trials.png")


def run(options: argparse.Namespace, keys: Mapping[str, Any]) -> str:
    """Tune one model on one data set; tables, ``best.yaml`` and a plot come into a folder of its own."""
    given: dict[str, Any] = {}
    for file in options.config_files.split():
        given |= read_yaml(Path(file))
    config = configure(config_dict={**given, **keys})
    space = _space(options, config, keys)
    fixed = {key: value for key, value in {**given, **keys}.items() if key not in ("model", "dataset", *space)}
    metric = str(config["valid_metric"]).lower()
    # Absolute, because a trial may run in another working directory.
    data_path = str(Path(fixed.pop("data_path", "dataset/")).absolute())
    model = config.class_path or config.model
    runs, base = Runs(options.folder / "runs", {"data_path": data_path}), Run(model, config.dataset, fixed)
    folder = _folder(options, space, base, runs)
    if (options.workers or 1) > 1:
        # Each trial has its share of the processors.
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // options.workers, 1)))
    with _tool(options, kept_objective(runs, base, metric)) as (objective, workers):

        def progress(state: dict[str, Any]) -> None:
            if tuning.stopping:
                raise KeyboardInterrupt
            if "epoch" in state:
                bar.set_postfix_str(f"epoch {state['epoch']}/{state['epochs']}")

        def after(trial: Trial) -> None:
            write_best()
            bar.update()
            bar.write(_line(tuning, trial, metric))

        def write_best() -> None:
            if best := tuning.best:
                settings = {"model": model, "dataset": config.dataset, "data_path": data_path, **fixed}
                text = yaml.safe_dump({**settings, **best.params}, sort_keys=False, allow_unicode=True)
                head = f"# Trial {best.number}: validation {metric} {best.score:.6f}. Train it again:\n"
                write_text(folder / "best.yaml", f"{head}# run_recbole_ssm.py --config_files best.yaml\n{text}")

        tuning = HyperTuning(
            partial(objective, progress=progress),
            space,
            table=folder / "trials.csv",
            workers=workers,
            seed=config["seed"],
            start=_present(space, config, given),
            bigger=bool(config["valid_metric_bigger"]),
            after=after,
            **{name: getattr(options, name) for name in ("algo", "max_evals", "early_stop", "prune")},
        )
        before = sum(trial.status in ("done", "pruned") for trial in tuning.trials)
        with progress_bar(unit="trial", total=tuning.max_evals, initial=before) as bar:
            bar.write(
                f"tune {config.model} on {config.dataset}: {tuning.search.algo} search of {tuning.max_evals} trials "
                f"over {', '.join(space)}, by {metric}; {before} are done; the table is {tuning.table}"
            )
            if order := _order(tuning):
                bar.write(order)
            tuning.run()
        # Also where the last process was killed before it came to this.
        write_best()
    return _report(tuning, options, folder, metric)


def kept_objective(runs: Runs, base: Run, metric: str) -> Objective:
    """An objective whose runs are kept; Optuna's trial, if it is given, is told of validations and may stop a run."""

    def objective(params: dict[str, Any], files: Any, trial: Any = None, progress: Progress = ignore) -> dict[str, Any]:
        # A run that was interrupted tells its earlier validations again.
        reported = trial and len(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        pruned = False

        def watch(state: dict[str, Any]) -> None:
            nonlocal reported, pruned
            progress(state)
            for score in state.get("validations", ())[reported:] if trial else ():
                reported += 1
                trial.report(score, reported)
                if pruned := trial.should_prune():
                    raise optuna().TrialPruned

        run = Run(base.model, base.dataset, {**base.options, **params})
        try:
            outcome = runs.get(run, watch)
        finally:
            if pruned:
                runs.give_up(run)
        if outcome.error is not None:
            raise UserError(outcome.error)
        if not outcome.valid:
            raise UserError("the split leaves no rows for validation, by which trials are chosen")
        found = {"best_valid_result": outcome.valid, "test_result": outcome.test, "seconds": outcome.seconds}
        return {"best_valid_score": outcome.validation(metric), **found}

    return objective


def _space(options: argparse.Namespace, config: Config, keys: Mapping[str, Any]) -> Space:
    """What is tuned; that every key can be is checked."""
    path = options.params_file or shipped_space(config.model)
    if path is None:
        raise UserError(f"--params_file: no search space ships for {config.model}; name a file")
    space, known = read_space(path), config.known_keys()
    for name, parameter in space.items():
        if name not in known:
            raise UserError(f"{parameter.where}: there is no key '{name}' of {config.model}{did_you_mean(name, known)}")
        if not config.rows[name].tunable:
            raise UserError(f"{parameter.where}: {name} cannot be tuned, because scores would mean different things")
        if name in keys:
            raise UserError(f"{parameter.where}: {name} is tuned there and given as --{name}; keep one")
    return space


def _present(space: Space, config: Config, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The setting as it is; None where no trial can have it.

    Where a parameter's condition does not hold, a trial has the default, and not what a configuration file says.
    """
    if any(name in given and parameter.condition for name, parameter in space.items()):
        return None
    return {name: config[name] for name in space}


def _folder(options: argparse.Namespace, space: Space, base: Run, runs: Runs) -> Path:
    """The folder of a search; another model, data set, space or option is another search."""
    search: list[Any] = [ALIASES.get(options.algo, options.algo)]
    search += [(p.name, p.kind, p.values, *([p.condition] if p.condition else [])) for p in space.values()]

    def with_its_trials(content: dict[str, Any]) -> list[Any]:
        # The table keeps the scores of trials, so it is as old as the results of the newest of them.
        tuned = [{parameter.name: value} for parameter in space.values() for value in parameter.values]
        # A condition of results_of that more than two tuned keys decide together is not found.
        settings = ({**content["settings"], **one, **other} for one, other in itertools.product(tuned, tuned))
        version = max(map(results_of, settings), key=lambda text: [*map(int, text.split("."))])
        return [*search, {**content, "version": version}, *([options.prune] if options.prune else [])]

    searches = map(with_its_trials, runs.contents(base))
    folder = existing(options.folder / base.stem, 8, searches)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _order(tuning: HyperTuning) -> str:
    """Which values are tried first, where that is not plain from the algorithm's name."""
    told, start = [], tuning.search.start
    if start and all(trial.params != start for trial in tuning.trials):
        told.append("the next trial is the setting as it is")
    if tuning.search.algo == "bayes" and tuning.max_evals <= STARTUP:
        others = "the others" if told else "all"
        told.append(f"{others} are drawn at random, because the Bayesian part begins after {STARTUP} trials")
    return "; ".join(told)


def _line(tuning: HyperTuning, trial: Trial, metric: str) -> str:
    best, told = tuning.best or trial, f"failed: {trial.error}"
    if trial.status == "done":
        so_far = "the best so far" if best == trial else f"best {best.score:.4f} of trial {best.number}"
        told = f"{metric} {trial.score:.4f} ({so_far}), trained in {trial.seconds:.0f} s"
    elif trial.status == "pruned":
        told = f"stopped at {metric} {trial.score:.4f}, behind the median"
    return f"trial {trial.number} of {tuning.max_evals}: {told}; {trial}"


def _report(tuning: HyperTuning, options: argparse.Namespace, folder: Path, metric: str) -> str:
    """Draw the plot and write what else was asked for; the best trial and what each key decides, as text."""
    if options.output_file:
        tuning.export_result(options.output_file)
    best = tuning.best
    if best is None:
        return "no trial is done yet; other processes are at this search"
    lines = [f"best: trial {best.number}, {metric} {best.score:.4f}: {best}\ntest result: {dict2str(best.test)}"]
    lines += _as_it_was(tuning, best, metric)
    try:
        tuning.plot(options.display_file or folder / "trials.png", f"validation {metric}")
    except UserError as error:
        lines.append(f"no plot: {error}")
    if len(set(tuning.score_list)) > 3:
        lines.append(_importance(tuning, folder / "importance.csv", metric))
    return "\n".join([*lines, f"train it: run_recbole_ssm.py --config_files {folder / 'best.yaml'}"])


def _as_it_was(tuning: HyperTuning, best: Trial, metric: str) -> list[str]:
    """What the setting with which the search began has reached beside the best, where it was tried."""
    tried = (trial for trial in tuning.trials if trial.params == tuning.search.start and trial.score is not None)
    if (trial := next(tried, None)) is None:
        return []
    if trial.number == best.number:
        return ["nothing that was tried is better than the setting as it was"]
    stopped = ", where it was stopped" if trial.status == "pruned" else ""
    return [f"the setting as it was: trial {trial.number}, {metric} {trial.score:.4f}{stopped}"]


def _importance(tuning: HyperTuning, path: Path, metric: str) -> str:
    """What each key decides, by functional analysis of variance (Hutter et al., ICML 2014), as a file and as text."""
    method = optuna().importance.FanovaImportanceEvaluator(seed=tuning.search.seed)
    shares = optuna().importance.get_param_importances(tuning.study, evaluator=method)
    told = ", ".join(f"{key} {share:.2f}" for key, share in shares.items())
    # Variances can be compared among keys alone that every trial has.
    conditional = [key for key in tuning.space if key not in shares]
    write_csv(path, [{"key": key, "importance": shares.get(key)} for key in [*shares, *conditional]])
    left_out = f"; left out, because not every trial has a value: {', '.join(conditional)}" if conditional else ""
    return f"importance (share of the variance of {metric} over the trials): {told}{left_out}"


@contextmanager
def _tool(options: argparse.Namespace, objective: Objective) -> Iterator[tuple[Callable[..., Any], int]]:
    """What runs a trial, and how many run at a time."""
    if options.tool != "Ray":
        yield objective, options.workers or 1
        return
    ray = require("ray", "--tool=Ray: Ray is not installed; run: pip install 'ray>=2.9', or take --workers")
    # The cluster of RAY_ADDRESS or of "ray start", else this machine alone.
    with ray.init(ignore_reinit_error=True):
        call = ray.remote(num_cpus=options.trial_cpus, num_gpus=options.trial_gpus)(lambda *given: objective(*given))

        def there(*given: Any, progress: Progress) -> Any:
            running = call.remote(*given)
            while not ray.wait([running], timeout=1)[0]:
                progress({})
            return ray.get(running)

        needs = {"CPU": options.trial_cpus, "GPU": options.trial_gpus}
        fits = [ray.cluster_resources().get(name, 0) / need for name, need in needs.items() if need]
        yield there, options.workers or max(int(min(fits, default=1)), 1)
