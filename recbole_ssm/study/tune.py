"""The best hyper-parameters, searched as by RecBole's run_hyper.py: ``recbole-ssm tune --model=M --params_file=FILE``.

A parameter file is RecBole's, with lines such as

    learning_rate loguniform -8,-4              natural logarithms of the bounds
    dropout_prob uniform 0.0,0.5
    num_layers quniform 1,4,1                   from 1 to 4 in steps of 1
    loss_type choice ['CE', 'gBCE']             any literals

Trials are chosen by the validation score; test metrics stand beside it. The table is written after every trial. The
same command goes on where it was stopped, also with more --max_evals: trials that are done are not run again, and one
that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from recbole.utils import dict2str
from tqdm import tqdm

from recbole_ssm.config import Config, read_yaml
from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.figure import check_drawable, figure
from recbole_ssm.files import alone, whole, write_csv
from recbole_ssm.quick_start import configure
from recbole_ssm.study.runs import Run, Runs
from recbole_ssm.study.space import Search, Space, Trial, cell, read_space, shipped_space, space_of

TOOLS = ("Hyperopt", "Ray")
NOT_TUNED = ("model", "dataset", "data_path", "eval_args", "metrics", "topk", "valid_metric")
PATIENCE = 10  # trials without progress, RecBole's

Objective = Callable[[dict[str, Any], "list[str] | None"], Mapping[str, Any]]
Submit = Callable[[dict[str, Any]], "Future[Mapping[str, Any]]"]


class HyperTuning:
    """RecBole's HyperTuning, which can be stopped and goes on, and runs trials side by side.

    What differs from RecBole's: parameter files are read without evaluating them; an exhaustive search visits every
    point, and stops early only if it is told to; a score of 0 is a score; a trial that fails is a row with the reason
    and stops nothing; hyperopt is needed by ``bayes`` alone.

    Args:
        objective_function: values and config files -> a result of
            :func:`recbole_ssm.quick_start.objective_function`. With several ``workers`` it is called in threads.
        space: the parameters, or
        params_file: the file that holds them, or
        params_dict: RecBole's dict of them.
        fixed_config_file_list: given to the objective.
        algo: ``exhaustive``, ``random`` or ``bayes``.
        max_evals: trials in all; None is 100, and every point for ``exhaustive``.
        early_stop: stop after so many trials without progress; None is 10, and never for ``exhaustive``.
        table: a CSV file that holds the trials, written after each; if it is there, its trials are taken over.
        workers: trials at a time.
        submit: starts a trial and returns its future, instead of the threads of this process.
        seed: of the search.
        bigger: whether a higher score is better.
        after: called with each trial that has ended.
    """

    def __init__(
        self,
        objective_function: Objective,
        space: Space | None = None,
        params_file: str | Path | None = None,
        params_dict: Mapping[str, Mapping[str, Any]] | None = None,
        fixed_config_file_list: list[str] | None = None,
        algo: str = "exhaustive",
        max_evals: int | None = None,
        early_stop: int | None = None,
        *,
        table: Path | None = None,
        workers: int = 1,
        submit: Submit | None = None,
        seed: int = 2020,
        bigger: bool = True,
        after: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        if space is None and params_file is None and params_dict is None:
            raise UserError("tune: one of space, params_file and params_dict must be given")
        self.space = space or (read_space(Path(params_file)) if params_file else space_of(params_dict or {}))
        self.search = Search(algo, self.space, seed)
        exhaustive = algo == "exhaustive"
        self.max_evals = max_evals if max_evals is not None else (self.search.size or 0) if exhaustive else 100
        self.early_stop = early_stop if early_stop is not None else None if exhaustive else PATIENCE
        self.objective_function = objective_function
        self.fixed_config_file_list = fixed_config_file_list
        self.table, self.workers, self.after = table, workers, after
        self.bigger = bigger
        self.stopping = False
        """Set when :meth:`run` ends by an exception: objectives in threads must then end too."""
        self._submit = submit
        self.trials = [] if table is None else read_trials(table, self.space)

    @property
    def best(self) -> Trial | None:
        """The trial of the best validation score, the first of equals."""
        done = [trial for trial in self.trials if trial.status == "done"]
        return max(done, key=lambda t: (t.score or 0.0) * (1 if self.bigger else -1), default=None)

    @property
    def best_params(self) -> dict[str, Any] | None:
        """Its values."""
        return self.best.params if self.best else None

    @property
    def best_score(self) -> float | None:
        """Its score."""
        return self.best.score if self.best else None

    def run(self) -> None:
        """Run the trials that are left.

        Raises:
            UserError: all of them failed.
            KeyboardInterrupt: the table says what was running; the next :meth:`run` begins with that.
        """
        again = [trial for trial in self.trials if trial.status != "done"]
        pending: dict[Future[Mapping[str, Any]], Trial] = {}
        with self._executor() as submit:
            while True:
                while len(pending) < self.workers and (trial := again.pop(0) if again else self._next()):
                    trial.status, trial.error = "running", ""
                    self._save()
                    pending[submit(trial.params)] = trial
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    trial = pending.pop(future)
                    self._finish(trial, future)
                    self._save()
                    self.after(trial)
        if self.trials and self.best is None:
            raise UserError(f"tune: all {len(self.trials)} trials failed; the first: {self.trials[0].error}")

    def export_result(self, output_file: str | Path) -> None:
        """Write all trials in the form of RecBole's result file."""
        with whole(Path(output_file)) as path, open(path, "w", encoding="utf-8") as file:
            for trial in self.trials:
                file.write(", ".join(f"{name}:{value}" for name, value in trial.params.items()) + "\n")
                if trial.status == "done":
                    file.write(f"Valid result:\n{dict2str(trial.valid)}\nTest result:\n{dict2str(trial.test)}\n\n")
                else:
                    file.write(f"{trial.status}: {trial.error}\n\n")

    def plot(self, path: Path, metric: str = "validation score") -> None:
        """Draw the score of each trial, and the best so far."""
        done = [trial for trial in self.trials if trial.status == "done" and trial.score is not None]
        best = (np.maximum if self.bigger else np.minimum).accumulate([trial.score or 0.0 for trial in done])
        with figure(path) as drawn:
            axes = drawn.subplots()
            axes.plot([t.number for t in done], [t.score for t in done], "o", label="trial")
            axes.step([t.number for t in done], best, where="post", label="best so far")
            axes.set(xlabel="trial", ylabel=metric)
            axes.legend()

    def _next(self) -> Trial | None:
        if len(self.trials) >= self.max_evals or self._stale():
            return None
        params = self.search.propose(self.trials, self.bigger)
        if params is None:
            return None
        self.trials.append(Trial(len(self.trials) + 1, params))
        return self.trials[-1]

    def _stale(self) -> bool:
        """Whether the last trials brought no progress."""
        ended = [trial for trial in self.trials if trial.status != "running"]
        if self.early_stop is None or self.best is None:
            return False
        return len(ended) - 1 - ended.index(self.best) >= self.early_stop

    def _finish(self, trial: Trial, future: Future[Mapping[str, Any]]) -> None:
        try:
            result = future.result()
            score = float(result["best_valid_score"])
            if not math.isfinite(score):
                raise UserError(f"the validation score is {score}")
        except Exception as error:
            text = " ".join(str(error).splitlines())
            trial.error = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
            trial.status = "failed"
            return
        trial.status, trial.score, trial.seconds = "done", score, result.get("seconds")
        trial.valid, trial.test = (
            {name: float(value) for name, value in (result[key] or {}).items()}
            for key in ("best_valid_result", "test_result")
        )

    def _save(self) -> None:
        if self.table is not None:
            write_trials(self.table, self.trials, self.space)

    @contextmanager
    def _executor(self) -> Iterator[Submit]:
        if self._submit is not None:
            yield self._submit
        elif self.workers == 1:
            yield lambda params: _at_once(self.objective_function, dict(params), self.fixed_config_file_list)
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                try:
                    yield lambda params: pool.submit(self.objective_function, dict(params), self.fixed_config_file_list)
                except BaseException:
                    self.stopping = True
                    raise


def _at_once(function: Objective, *arguments: Any) -> Future[Mapping[str, Any]]:
    """The result of a call that is made here and now; Ctrl-C goes through."""
    future: Future[Mapping[str, Any]] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def write_trials(path: Path, trials: Iterable[Trial], space: Space) -> None:
    """The table of trials as comma-separated values, whole or not at all."""
    rows = [
        {
            "trial": trial.number,
            "status": trial.status,
            "score": trial.score,
            **{name: cell(trial.params[name]) for name in space},
            **{f"valid {name}": value for name, value in trial.valid.items()},
            **{f"test {name}": value for name, value in trial.test.items()},
            "seconds": trial.seconds,
            "error": trial.error,
        }
        for trial in trials
    ]
    write_csv(path, rows)


def read_trials(path: Path, space: Space) -> list[Trial]:
    """The trials of a table that :func:`write_trials` wrote; none where there is no table.

    Raises:
        UserError: the table is damaged, or of other parameters.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [_trial(row, space) for row in rows]
    except (KeyError, ValueError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, or not a table of these parameters ({error}); move it away") from error


def _trial(row: dict[str, str], space: Space) -> Trial:
    def number(key: str) -> float | None:
        return float(row[key]) if row[key] else None

    def metrics(part: str) -> dict[str, float]:
        return {key[len(part) :]: float(row[key]) for key in row if key.startswith(part) and row[key]}

    return Trial(
        number=int(row["trial"]),
        params={name: parameter.from_cell(row[name]) for name, parameter in space.items()},
        status=row["status"],
        score=number("score"),
        valid=metrics("valid "),
        test=metrics("test "),
        seconds=number("seconds"),
        error=row["error"],
    )


@dataclass(frozen=True)
class KeptObjective:
    """The objective of one model on one data set, whose runs are done once (:class:`recbole_ssm.study.runs.Runs`)."""

    folder: str
    data_path: str
    model: str
    dataset: str
    fixed: dict[str, Any]
    metric: str
    bigger: bool

    def content(self) -> dict[str, Any]:
        """All that decides results beside the values that are tuned."""
        return self._runs().content(Run(self.model, self.dataset, self.fixed))

    def __call__(
        self,
        config_dict: dict[str, Any],
        config_file_list: list[str] | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """As :func:`recbole_ssm.quick_start.objective_function`, in a process of its own.

        Raises:
            UserError: the run failed, or there is nothing to validate on.
        """
        outcome = self._runs().get(Run(self.model, self.dataset, {**self.fixed, **config_dict}), progress)
        if outcome.error is not None:
            raise UserError(outcome.error)
        if not outcome.valid:
            raise UserError("the split leaves no rows for validation, by which trials are chosen")
        return {
            "model": self.model,
            "best_valid_score": outcome.valid[self.metric],
            "valid_score_bigger": self.bigger,
            "best_valid_result": outcome.valid,
            "test_result": outcome.test,
            "seconds": outcome.seconds,
        }

    def _runs(self) -> Runs:
        return Runs(self.folder, {"data_path": self.data_path})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of run_hyper.py, and ours."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--params_file", type=Path, metavar="FILE", help="the space; default properties/hyper/MODEL.hyper"
    )
    parser.add_argument("--config_files", default="", metavar="FILES", help="YAML files of what is fixed")
    parser.add_argument("--algo", default="exhaustive", metavar="ALGO", help="exhaustive (default), random or bayes")
    parser.add_argument("--max_evals", type=int, metavar="N", help="trials in all; default 100, exhaustive: all points")
    parser.add_argument(
        "--early_stop",
        type=int,
        metavar="N",
        help="stop after N trials without progress; default 10, exhaustive: never",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="trials at a time; default 1, with Ray as many as fit")
    parser.add_argument(
        "--tool",
        default="Hyperopt",
        metavar="TOOL",
        help="Hyperopt (default) on this machine; Ray on its cluster, or on this machine if there is none",
    )
    parser.add_argument(
        "--trial_cpus", type=float, default=1, metavar="N", help="Ray: processors of a trial; default 1"
    )
    parser.add_argument(
        "--trial_gpus", type=float, default=0, metavar="N", help="Ray: GPUs of a trial, also parts; default 0"
    )
    parser.add_argument(
        "--output_file", type=Path, metavar="FILE", help="also write all results there in RecBole's form"
    )
    parser.add_argument("--display_file", type=Path, metavar="FILE", help="draw the plot there; default trials.png")


def run(options: argparse.Namespace, keys: Mapping[str, Any]) -> None:
    """Tune one model on one data set; ``trials.csv``, ``best.yaml`` and ``trials.png`` come into a folder of its own.

    Raises:
        UserError: the space or an option is wrong, or every trial failed.
    """
    if options.tool not in TOOLS:
        raise UserError(f"--tool: '{options.tool}' is not one of {', '.join(TOOLS)}{did_you_mean(options.tool, TOOLS)}")
    for option in ("max_evals", "early_stop", "workers"):
        if getattr(options, option) is not None and getattr(options, option) < 1:
            raise UserError(f"--{option}: must be at least 1, got {getattr(options, option)}")
    for option in ("output_file", "display_file"):
        file = getattr(options, option)
        if file and not file.absolute().parent.is_dir():
            raise UserError(f"--{option}: there is no folder {file.absolute().parent}")
    if options.display_file:
        check_drawable(options.display_file)  # before anything is trained
    fixed: dict[str, Any] = {}
    for file in options.config_files.split():
        fixed |= read_yaml(Path(file))
    config = configure(config_dict={**fixed, **keys})
    space = read_space(options.params_file or _shipped(config.model))
    _check(space, config, keys)
    fixed = {key: value for key, value in {**fixed, **keys}.items() if key not in ("model", "dataset", *space)}
    metric, bigger = str(config["valid_metric"]).lower(), bool(config["valid_metric_bigger"])
    data_path = str(Path(fixed.pop("data_path", "dataset/")).absolute())  # for whoever stands elsewhere
    runs = str((options.folder / "runs").absolute())
    objective = KeptObjective(runs, data_path, config.model, config.dataset, fixed, metric, bigger)
    # the same search goes on; another model, data set, space, option or version has another folder
    search = [options.algo, *((p.name, p.kind, p.values) for p in space.values()), objective.content()]
    digest = hashlib.sha256(json.dumps(search, sort_keys=True).encode()).hexdigest()
    folder: Path = options.folder / f"{config.model}-{config.dataset}-{digest[:8]}"
    folder.mkdir(parents=True, exist_ok=True)

    if (options.workers or 1) > 1:  # side by side, each with its share of the processors
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // options.workers, 1)))
    with _claimed(folder), _tool(options, objective) as (submit, workers), tqdm(unit="trial", disable=None) as bar:

        def progress(state: dict[str, Any]) -> None:
            if tuning.stopping:
                raise KeyboardInterrupt
            bar.set_postfix_str(f"epoch {state.get('epoch', 1)}/{state.get('epochs', '?')}")

        def write_best(trial: Trial) -> None:
            settings = {"data_path": data_path, **fixed, **trial.params}
            _write_best(folder / "best.yaml", config, settings, trial, metric)

        def after(trial: Trial) -> None:
            if trial is tuning.best:
                write_best(trial)
            bar.update()
            bar.write(_line(tuning, trial, metric))

        tuning = HyperTuning(
            lambda params, files: objective(params, files, progress),
            space,
            algo=options.algo,
            max_evals=options.max_evals,
            early_stop=options.early_stop,
            table=folder / "trials.csv",
            workers=workers,
            submit=submit,
            seed=config["seed"],
            bigger=bigger,
            after=after,
        )
        before = sum(trial.status == "done" for trial in tuning.trials)
        bar.reset(total=tuning.max_evals)
        bar.update(before)
        bar.write(
            f"tune {config.model} on {config.dataset}: {options.algo} search of {tuning.max_evals} trials over "
            f"{', '.join(space)}, by {metric}; {before} are done; the table is {folder / 'trials.csv'}"
        )
        tuning.run()
        best = tuning.best
        assert best is not None
        write_best(best)  # also where the kill came between the table and it
    if options.output_file:
        tuning.export_result(options.output_file)
    _plot(tuning, options.display_file, folder / "trials.png", metric)
    print(f"best: trial {best.number}, {metric} {best.score:.4f}: {best}\ntest result: {dict2str(best.test)}")
    print(f"train it: run_recbole_ssm.py --config_files {folder / 'best.yaml'}")


def _shipped(model: str) -> Path:
    path = shipped_space(model)
    if path is None:
        raise UserError(f"--params_file: no search space ships for {model}; name a file")
    return path


def _check(space: Space, config: Config, keys: Mapping[str, Any]) -> None:
    """That every key can be tuned."""
    known = config.known_keys()
    for name, parameter in space.items():
        if name not in known:
            raise UserError(f"{parameter.where}: there is no key '{name}' of {config.model}{did_you_mean(name, known)}")
        if name in NOT_TUNED:
            raise UserError(f"{parameter.where}: {name} cannot be tuned, because scores would mean different things")
        if name in keys:
            raise UserError(f"{parameter.where}: {name} is tuned there and given as --{name}; keep one")


def _line(tuning: HyperTuning, trial: Trial, metric: str) -> str:
    head = f"trial {trial.number} of {tuning.max_evals}: "
    if trial.status == "failed":
        return f"{head}failed: {trial.error}; {trial}"
    best = tuning.best
    assert best is not None
    so_far = "the best so far" if best is trial else f"best {best.score:.4f} of trial {best.number}"
    spent = "" if trial.seconds is None else f", trained in {trial.seconds:.0f} s"
    return f"{head}{metric} {trial.score:.4f} ({so_far}){spent}; {trial}"


def _write_best(path: Path, config: Config, options: dict[str, Any], trial: Trial, metric: str) -> None:
    """The options of a trial as a file for ``--config_files``."""
    named = {"model": config.model, "dataset": config.dataset, **options}
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f"# Trial {trial.number}: validation {metric} {trial.score:.6f}. Train it again:\n")
        file.write(f"# run_recbole_ssm.py --config_files {path.name}\n")
        yaml.safe_dump(named, file, sort_keys=False, allow_unicode=True)


def _plot(tuning: HyperTuning, asked: Path | None, default: Path, metric: str) -> None:
    try:
        tuning.plot(asked or default, f"validation {metric}")
    except UserError as error:
        if asked:
            raise
        print(f"no plot: {error}")


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """A search's folder for this process alone: two would write over each other's table."""
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(folder, wait=False))
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is at this search; let it end, or stop it and give the same command"
            ) from None
        yield


@contextmanager
def _tool(options: argparse.Namespace, objective: KeptObjective) -> Iterator[tuple[Submit | None, int]]:
    """What runs trials, and how many at a time."""
    if options.tool != "Ray":
        yield None, options.workers or 1
        return
    try:
        import ray
    except ImportError as error:
        raise UserError("--tool=Ray: Ray is not installed; run: pip install 'ray>=2.9', or take --workers") from error
    ray.init(ignore_reinit_error=True)  # the cluster of RAY_ADDRESS or of "ray start", else this machine alone
    try:
        call = ray.remote(num_cpus=options.trial_cpus, num_gpus=options.trial_gpus)(lambda params: objective(params))
        have = ray.cluster_resources()
        fits = [have.get("CPU", 0) / options.trial_cpus] if options.trial_cpus else []
        fits += [have.get("GPU", 0) / options.trial_gpus] if options.trial_gpus else []
        yield lambda params: call.remote(params).future(), options.workers or max(int(min(fits, default=1)), 1)
    finally:
        ray.shutdown()
