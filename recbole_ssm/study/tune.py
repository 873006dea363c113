"""The best hyper-parameters, searched as by RecBole's run_hyper.py: ``recbole-ssm tune --model=M --params_file=FILE``.

A parameter file is RecBole's, with lines such as

    learning_rate loguniform -8,-4              natural logarithms of the bounds
    dropout_prob uniform 0.0,0.5
    num_layers quniform 1,4,1                   from 1 to 4 in steps of 1
    loss_type choice ['CE', 'gBCE']             any literals
    gbce_t uniform 0,1 if loss_type == 'gBCE'   a condition on an earlier line; or: if num_layers in [1, 2]
    weight_decay                                values of the table of keys (recbole-ssm keys weight_decay)

Trials are chosen by the validation score; test metrics stand beside it. The table is written after every trial. The
same command goes on where it was stopped, also with more --max_evals: trials that are done are not run again, and one
that was interrupted goes on from its checkpoint. Given several times at once, it shares the trials among the processes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from recbole.utils import dict2str
from tqdm import tqdm

from recbole_ssm.arguments import at_least, one_of, path_that, read_yaml
from recbole_ssm.config import Config
from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.figure import check_drawable
from recbole_ssm.files import check_writable, digest_of_json, write_text
from recbole_ssm.quick_start import configure
from recbole_ssm.study.hyper_tuning import HyperTuning, Objective
from recbole_ssm.study.runs import Progress, Run, Runs, ignore
from recbole_ssm.study.space import ALIASES, Space, Trial, optuna, read_space, shipped_space

# RecBole calls the tool of one machine Hyperopt.
TOOLS = ("Optuna", "Hyperopt", "Ray")


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
    prune = "stop a trial that is behind the median of the others after N validations; N is 3 where it is not given"
    add("--prune", type=at_least(1), nargs="?", const=3, metavar="N", help=prune)
    add("--workers", type=at_least(1), metavar="N", help="trials at a time; default 1, with Ray as many as fit")
    tools = "Optuna (default) on this machine; Ray on its cluster, or on this machine if there is none"
    add("--tool", type=one_of(TOOLS), default="Optuna", metavar="TOOL", help=tools)
    add("--trial_cpus", type=float, default=1, metavar="N", help="Ray: processors of a trial; default 1")
    add("--trial_gpus", type=float, default=0, metavar="N", help="Ray: GPUs of a trial, also parts; default 0")
    file, drawn = path_that(check_writable), path_that(check_drawable)
    add("--output_file", type=file, metavar="FILE", help="also write all results there in RecBole's form")
    add("--display_file", type=drawn, metavar="FILE", help="draw the plot there; default trials.png")


def run(options: argparse.Namespace, keys: Mapping[str, Any]) -> str:
    """Tune one model on one data set; ``trials.csv``, ``best.yaml`` and ``trials.png`` come into a folder of its own.

    Raises:
        UserError: the space or an option is wrong, or every trial failed.
    """
    fixed: dict[str, Any] = {}
    for file in options.config_files.split():
        fixed |= read_yaml(Path(file))
    config = configure(config_dict={**fixed, **keys})
    space = _space(options, config, keys)
    fixed = {key: value for key, value in {**fixed, **keys}.items() if key not in ("model", "dataset", *space)}
    metric, bigger = str(config["valid_metric"]).lower(), bool(config["valid_metric_bigger"])
    # Absolute, because a trial may run in another working directory.
    data_path = str(Path(fixed.pop("data_path", "dataset/")).absolute())
    runs, base = Runs(options.folder / "runs", {"data_path": data_path}), Run(config.model, config.dataset, fixed)
    folder = _folder(options, space, base, runs.content(base))
    if (options.workers or 1) > 1:
        # Each trial has its share of the processors.
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // options.workers, 1)))
    tool = _tool(options, kept_objective(runs, base, metric))
    with tool as (objective, workers), tqdm(unit="trial", disable=None) as bar:

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
                named = {"model": config.model, "dataset": config.dataset, "data_path": data_path}
                write_text(folder / "best.yaml", _config_file({**named, **fixed}, best, metric))

        tuning = HyperTuning(
            partial(objective, progress=progress),
            space,
            table=folder / "trials.csv",
            workers=workers,
            seed=config["seed"],
            bigger=bigger,
            after=after,
            **{name: getattr(options, name) for name in ("algo", "max_evals", "early_stop", "prune")},
        )
        before = sum(trial.status in ("done", "pruned") for trial in tuning.trials)
        bar.reset(total=tuning.max_evals)
        bar.update(before)
        bar.write(
            f"tune {config.model} on {config.dataset}: {tuning.search.algo} search of {tuning.max_evals} trials over "
            f"{', '.join(space)}, by {metric}; {before} are done; the table is {folder / 'trials.csv'}"
        )
        tuning.run()
        # Also where the last process was killed before it came to this.
        write_best()
    return _report(tuning, options, folder, metric)


def kept_objective(runs: Runs, base: Run, metric: str) -> Objective:
    """An objective whose ``runs`` are kept and done once; ``base`` is what is fixed, ``metric`` the score.

    Where it is given Optuna's trial, it tells it of each validation, and stops the run if the trial is pruned.
    """

    def objective(params: dict[str, Any], files: Any, trial: Any = None, progress: Progress = ignore) -> dict[str, Any]:
        # A run that was interrupted tells its earlier validations again.
        reported = trial and len(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)

        def watch(state: dict[str, Any]) -> None:
            nonlocal reported
            progress(state)
            for score in state.get("validations", ())[reported:] if trial else ():
                reported += 1
                trial.report(score, reported)
                if trial.should_prune():
                    raise optuna().TrialPruned

        outcome = runs.get(Run(base.model, base.dataset, {**base.options, **params}), watch)
        if outcome.error is not None:
            raise UserError(outcome.error)
        if not outcome.valid:
            raise UserError("the split leaves no rows for validation, by which trials are chosen")
        found = {"best_valid_result": outcome.valid, "test_result": outcome.test, "seconds": outcome.seconds}
        return {"best_valid_score": outcome.valid[metric], **found}

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


def _folder(options: argparse.Namespace, space: Space, base: Run, content: dict[str, Any]) -> Path:
    """The folder of a search; another model, data set, space, option or version is another search."""
    search: list[Any] = [ALIASES.get(options.algo, options.algo)]
    search += [(p.name, p.kind, p.values, *([p.condition] if p.condition else [])) for p in space.values()]
    search += [content, *([options.prune] if options.prune else [])]
    folder: Path = options.folder / f"{base.model}-{base.dataset}-{digest_of_json(search)[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _line(tuning: HyperTuning, trial: Trial, metric: str) -> str:
    best, told = tuning.best or trial, f"failed: {trial.error}"
    if trial.status == "done":
        so_far = "the best so far" if best == trial else f"best {best.score:.4f} of trial {best.number}"
        told = f"{metric} {trial.score:.4f} ({so_far})"
        told += "" if trial.seconds is None else f", trained in {trial.seconds:.0f} s"
    elif trial.status == "pruned":
        told = f"stopped at {metric} {trial.score:.4f}, behind the median"
    return f"trial {trial.number} of {tuning.max_evals}: {told}; {trial}"


def _config_file(settings: Mapping[str, Any], trial: Trial, metric: str) -> str:
    text = yaml.safe_dump({**settings, **trial.params}, sort_keys=False, allow_unicode=True)
    head = f"# Trial {trial.number}: validation {metric} {trial.score:.6f}. Train it again:\n"
    return f"{head}# run_recbole_ssm.py --config_files best.yaml\n{text}"


def _report(tuning: HyperTuning, options: argparse.Namespace, folder: Path, metric: str) -> str:
    """Draw the plot and write what else was asked for; the best trial and what each key decides, as text."""
    if options.output_file:
        tuning.export_result(options.output_file)
    best = tuning.best
    if best is None:
        return "no trial is done yet; other processes are at this search"
    lines = []
    try:
        tuning.plot(options.display_file or folder / "trials.png", f"validation {metric}")
    except UserError as error:
        if options.display_file:
            raise
        lines.append(f"no plot: {error}")
    lines.append(f"best: trial {best.number}, {metric} {best.score:.4f}: {best}\ntest result: {dict2str(best.test)}")
    if len(set(tuning.score_list)) > 3:
        # By functional analysis of variance (Hutter et al., ICML 2014).
        method = optuna().importance.FanovaImportanceEvaluator(seed=tuning.search.seed)
        shares = optuna().importance.get_param_importances(tuning.study, evaluator=method)
        told = ", ".join(f"{key} {share:.2f}" for key, share in shares.items())
        lines.append(f"importance (share of the variance of {metric} over the trials): {told}")
    return "\n".join([*lines, f"train it: run_recbole_ssm.py --config_files {folder / 'best.yaml'}"])


@contextmanager
def _tool(options: argparse.Namespace, objective: Objective) -> Iterator[tuple[Callable[..., Any], int]]:
    """What runs a trial, and how many run at a time."""
    if options.tool != "Ray":
        yield objective, options.workers or 1
        return
    try:
        import ray
    except ImportError as error:
        raise UserError("--tool=Ray: Ray is not installed; run: pip install 'ray>=2.9', or take --workers") from error
    # The cluster of RAY_ADDRESS or of "ray start", else this machine alone.
    ray.init(ignore_reinit_error=True)
    try:
        call = ray.remote(num_cpus=options.trial_cpus, num_gpus=options.trial_gpus)(lambda *given: objective(*given))

        def there(*given: Any, progress: Progress) -> Any:
            running = call.remote(*given)
            while not ray.wait([running], timeout=1)[0]:
                progress({})
            return ray.get(running)

        have = ray.cluster_resources()
        fits = [have.get("CPU", 0) / options.trial_cpus] if options.trial_cpus else []
        fits += [have.get("GPU", 0) / options.trial_gpus] if options.trial_gpus else []
        yield there, options.workers or max(int(min(fits, default=1)), 1)
    finally:
        ray.shutdown()
