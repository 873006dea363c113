"""RecBole's HyperTuning on Optuna, whose trials outlive kills and are shared among processes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from recbole.utils import dict2str

from recbole_ssm.errors import UserError
from recbole_ssm.figure import figure
from recbole_ssm.files import append_lines, claim, locked, read_lines, whole
from recbole_ssm.study.space import (
    STATES,
    Search,
    Space,
    Trial,
    optuna,
    read_space,
    read_trials,
    space_of,
    write_trials,
)  # fmt: skip

# Trials without progress after which a search stops, as in RecBole.
PATIENCE = 10

Objective = Callable[..., Mapping[str, Any]]


class HyperTuning:
    """RecBole's HyperTuning on Optuna: it can be stopped and goes on, and runs trials side by side.

    Parameter files are not evaluated; an exhaustive search visits every point, and stops early only if it is told to; a
    trial that fails is a row with the reason, and the next :meth:`run` tries it again. RecBole's ``best_params``,
    ``best_score``, ``best_test_result``, ``params2result``, ``params_list`` and ``score_list`` tell what was found.

    The arguments up to ``early_stop`` are RecBole's, with one of ``space``, ``params_file`` and ``params_dict``.

    Args:
        objective_function: called with values and ``fixed_config_file_list``, in threads if there are several
            ``workers``; returns a result like that of :func:`recbole_ssm.quick_start.objective_function`.
        display_file: where :meth:`run` draws the trials in the end: a PNG, SVG or PDF file.
        max_evals: trials in all; None is 100, and every point for ``exhaustive``.
        early_stop: stop after so many trials without progress; None is 10, and never for ``exhaustive``.
        table: a CSV file that shows the trials, written after each. A journal of the same name beside it keeps them,
            also for other processes that work on the same search.
        workers: trials at a time.
        bigger: whether a higher score is better.
        after: called with each trial that has ended.
        prune: stop a trial whose best score is behind the median of the others after so many reports. The objective
            then takes Optuna's ``trial`` as third argument, calls ``trial.report(score, number)`` with numbers from 1
            up, and raises ``optuna.TrialPruned`` when ``trial.should_prune()``.
    """

    def __init__(
        self,
        objective_function: Objective,
        space: Space | None = None,
        params_file: str | Path | None = None,
        params_dict: Mapping[str, Mapping[str, Any]] | None = None,
        fixed_config_file_list: list[str] | None = None,
        display_file: str | Path | None = None,
        algo: str = "exhaustive",
        max_evals: int | None = None,
        early_stop: int | None = None,
        *,
        table: Path | None = None,
        workers: int = 1,
        seed: int = 2020,
        bigger: bool = True,
        after: Callable[[Trial], None] = lambda trial: None,
        prune: int | None = None,
    ) -> None:
        if space is None and params_file is None and params_dict is None:
            raise UserError("tune: one of space, params_file and params_dict must be given")
        self.space = space or (read_space(Path(params_file)) if params_file else space_of(params_dict or {}))
        self.search = Search(algo, self.space, seed)
        exhaustive = self.search.algo == "exhaustive"
        self.max_evals = max_evals if max_evals is not None else (self.search.size or 0) if exhaustive else 100
        self.early_stop = early_stop if early_stop is not None else None if exhaustive else PATIENCE
        self.objective_function = objective_function
        self.fixed_config_file_list, self.display_file = fixed_config_file_list, display_file
        self.table, self.workers, self.bigger, self.after, self.prune = table, workers, bigger, after, prune
        # Set when a run ends by an exception: objectives in threads must then end too.
        self.stopping = False
        # Numbers of trials: those that had failed before this run, and those that this run has begun.
        self._failed, self._begun = set[int](), set[int]()
        self._lock = threading.Lock()
        self._claims = None if table is None else open(table.with_suffix(".running"), "a")  # noqa: SIM115
        with self._alone():
            self.study = self._open()
        self._note()

    @property
    def trials(self) -> list[Trial]:
        """All trials so far, those of other processes among them."""
        found = []
        for frozen in self.study.get_trials(deepcopy=False):
            given = [(name, self.space[name]) for name in self.space if name in frozen.params]
            params = {name: parameter.from_optuna(frozen.params[name]) for name, parameter in given}
            found.append(Trial(frozen.number + 1, params, **frozen.user_attrs["result"]))
        return found

    @property
    def best(self) -> Trial | None:
        """The trial of the best validation score, the first of equals."""
        done = [trial for trial in self.trials if trial.status == "done"]
        return max(done, key=lambda trial: (trial.score or 0.0) * (1 if self.bigger else -1), default=None)

    def run(self) -> None:
        """Run the trials that are left and that no other process runs.

        Raises:
            UserError: all of them failed.
            KeyboardInterrupt: the next :meth:`run` begins with what was running.
        """
        self._failed = {trial.number for trial in self.trials if trial.status == "failed"}
        self._begun.clear()
        if self.workers == 1:
            self._work()
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                try:
                    for worker in as_completed([pool.submit(self._work) for _ in range(self.workers)]):
                        worker.result()
                except BaseException:
                    self.stopping = True
                    raise
        trials = self.trials
        if trials and all(trial.status == "failed" for trial in trials):
            raise UserError(f"tune: all {len(trials)} trials failed; the first: {trials[0].error}")
        if self.display_file is not None:
            self.plot(Path(self.display_file))

    def export_result(self, output_file: str | Path) -> None:
        """Write all trials in the form of RecBole's result file."""
        with whole(Path(output_file)) as path, open(path, "w", encoding="utf-8") as file:
            for trial in self.trials:
                file.write(f"{self.params2str(trial.params)}\n")
                if trial.status == "done":
                    file.write(f"Valid result:\n{dict2str(trial.valid)}\nTest result:\n{dict2str(trial.test)}\n\n")
                else:
                    file.write(f"{trial.status}: {trial.error}\n\n")

    @staticmethod
    def params2str(params: Mapping[str, Any]) -> str:
        """Values as RecBole writes them."""
        return ", ".join(f"{name}:{value}" for name, value in params.items())

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

    def _work(self) -> None:
        """Run one trial after the other until none is left."""
        while not self.stopping and (trial := self._next()):
            handle = self._handle(trial)
            try:
                self._evaluate(trial, [handle] if self.prune else [])
            except optuna().TrialPruned:
                reported = self.study.get_trials(deepcopy=False)[handle.number].intermediate_values.values()
                trial.status, trial.score = "pruned", (max if self.bigger else min)(reported)
            except Exception as error:
                text = " ".join(str(error).splitlines())
                trial.error = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
                trial.status = "failed"
            with self._alone():
                handle.set_user_attr("result", trial.result())
                if trial.status != "failed":
                    score = trial.score if trial.status == "done" else None
                    self.study.tell(handle, score, state=optuna().trial.TrialState[STATES[trial.status]])
                self._note()
            self.after(trial)

    def _evaluate(self, trial: Trial, handle: list[Any]) -> None:
        result = self.objective_function(dict(trial.params), self.fixed_config_file_list, *handle)
        score = float(result["best_valid_score"])
        if not math.isfinite(score):
            raise UserError(f"the validation score is {score}")
        trial.status, trial.score, trial.seconds = "done", score, result.get("seconds")
        trial.valid = {name: float(value) for name, value in (result["best_valid_result"] or {}).items()}
        trial.test = {name: float(value) for name, value in (result["test_result"] or {}).items()}

    def _next(self) -> Trial | None:
        """Begin the next trial: one that was interrupted or had failed, else a new one; None where none is left."""
        with self._alone():
            trials = self.trials
            again = next((trial for trial in trials if self._is_open(trial)), None)
            params = again.params if again else self._propose(trials)
            if params is None:
                return None
            trial = Trial(again.number if again else len(trials) + 1, params)
            if again:
                self._handle(trial).set_user_attr("result", trial.result())
            else:
                self.study.add_trial(self.search.frozen(trial))
                self._claim(trial)
            self._begun.add(trial.number)
            self._note()
            return trial

    def _handle(self, trial: Trial) -> Any:
        """A trial as Optuna's, to be reported and told."""
        kept = self.study.get_trials(deepcopy=False)[trial.number - 1]
        return optuna().trial.Trial(self.study, kept._trial_id)

    def _is_open(self, trial: Trial) -> bool:
        """Whether a trial must be tried again, and no process is at it."""
        again = trial.status == "running" or (trial.status == "failed" and trial.number in self._failed)
        return again and trial.number not in self._begun and self._claim(trial)

    def _claim(self, trial: Trial) -> bool:
        return self._claims is None or claim(self._claims, trial.number)

    def _propose(self, trials: list[Trial]) -> dict[str, Any] | None:
        """The values of a new trial, unless there are enough or the last ones brought no progress."""
        ended = [trial.number for trial in trials if trial.status != "running"]
        patience, best = self.early_stop, self.best
        stale = patience is not None and best is not None and len(ended) - 1 - ended.index(best.number) >= patience
        return None if stale or len(trials) >= self.max_evals else self.search.propose(trials, self.bigger)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other thread or process begins or ends a trial."""
        with self._lock, nullcontext() if self.table is None else locked(self.table.absolute().parent):
            yield

    def _note(self) -> None:
        """Write the table, and bring RecBole's attributes up to date."""
        trials, best = self.trials, self.best
        if self.table is not None and trials:
            write_trials(self.table, trials, self.space)
        done = [trial for trial in trials if trial.status == "done"]
        self.best_params, self.best_score = best and best.params, best and best.score
        self.best_test_result = best and best.test
        self.score_list = [trial.score for trial in done]
        self.params_list = [self.params2str(trial.params) for trial in done]
        results = [{"best_valid_result": trial.valid, "test_result": trial.test} for trial in done]
        self.params2result = dict(zip(self.params_list, results))

    def _open(self) -> Any:
        """The study in memory or in the journal, which is made from the table if only that is there, as of 0.1.0."""
        pruners = optuna().pruners
        options = {
            "study_name": "tune",
            "load_if_exists": True,
            "direction": "maximize" if self.bigger else "minimize",
            "pruner": pruners.MedianPruner(n_warmup_steps=self.prune) if self.prune else pruners.NopPruner(),
        }
        if self.table is None:
            return optuna().create_study(**options)
        journal, storage = self.table.with_suffix(".journal"), optuna().storages.JournalStorage
        if not journal.is_file():
            trials = [self.search.frozen(trial) for trial in read_trials(self.table, self.space)]
            with whole(journal) as new:
                optuna().create_study(storage=storage(Journal(new)), **options).add_trials(trials)
        try:
            return optuna().create_study(storage=storage(Journal(journal)), **options)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{journal}: damaged ({error}); move it away, and {self.table} takes its place") from error


class Journal:
    """A file of Optuna's journal that several processes may write, and that a kill at any moment leaves readable.

    After Optuna's own class for such a file was killed with its lock, others wait half a minute, and behind a torn line
    it cannot read on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def read_logs(self, log_number_from: int) -> list[Any]:
        """The entries from a number on."""
        return read_lines(self._path, log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add entries."""
        append_lines(self._path, logs)
