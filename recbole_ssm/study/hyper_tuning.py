"""RecBole's HyperTuning on Optuna, whose trials outlive kills and are shared among processes."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from recbole.utils import dict2str

from recbole_ssm.errors import UserError
from recbole_ssm.figure import figure
from recbole_ssm.files import Journal, claim, locked, whole
from recbole_ssm.study.space import Search, Space, Trial, optuna, read_space, read_trials, space_of, write_trials

Objective = Callable[..., Mapping[str, Any]]


class HyperTuning:
    """RecBole's HyperTuning on Optuna: it can be stopped and goes on, and runs trials side by side.

    Parameter files are not evaluated; an exhaustive search visits every point, and stops early only if it is told to; a
    trial that fails is a row with the reason, and the next :meth:`run` tries it again.

    The arguments up to ``early_stop`` are RecBole's, with one of ``space``, ``params_file`` and ``params_dict``.

    Args:
        objective_function: called with values and ``fixed_config_file_list``, in threads if there are several
            ``workers``; returns a result like that of :func:`recbole_ssm.quick_start.objective_function`.
        display_file: where :meth:`run` draws the trials in the end: a PNG, SVG or PDF file.
        max_evals: trials in all; None is 100, and every point for ``exhaustive``.
        early_stop: stop after so many trials without progress; None is RecBole's 10, and never for ``exhaustive``.
        table: a CSV file that shows the trials, written after each. A journal of the same name beside it keeps them,
            also for other processes that work on the same search. None: both go with this object.
        workers: trials at a time.
        start: values that a random or a Bayesian search tries next, if the space has them and no trial has had them.
        bigger: whether a higher score is better.
        after: called with each trial that has ended, for one trial at a time.
        prune: stop a trial whose best score is behind the median of the others after so many reports; the first five
            run to their end (``n_startup_trials`` of Optuna's ``MedianPruner``). The objective then takes Optuna's
            ``trial`` as third argument, calls ``trial.report(score, number)`` with numbers from 1 up, and raises
            ``optuna.TrialPruned`` when ``trial.should_prune()``.
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
        start: Mapping[str, Any] | None = None,
        bigger: bool = True,
        after: Callable[[Trial], None] = lambda trial: None,
        prune: int | None = None,
    ) -> None:
        if space is None and params_file is None and params_dict is None:
            raise UserError("tune: one of space, params_file and params_dict must be given")
        self.space = space or (read_space(Path(params_file)) if params_file else space_of(params_dict or {}))
        self.search = Search(algo, self.space, seed, start)
        exhaustive = self.search.algo == "exhaustive"
        self.max_evals = max_evals if max_evals is not None else (self.search.size or 0) if exhaustive else 100
        self.early_stop = early_stop if early_stop is not None else None if exhaustive else 10
        self.objective_function = objective_function
        self.fixed_config_file_list, self.display_file = fixed_config_file_list, display_file
        self.workers, self.bigger, self.after, self.prune = workers, bigger, after, prune
        # Set when a run ends by an exception: objectives in threads must then end too.
        self.stopping = False
        # Numbers of trials: those that had failed before this run, and those that this run has begun.
        self._failed, self._begun = set[int](), set[int]()
        # Held, with a lock on the folder, while a trial begins or ends: by one thread of one process.
        self._lock = threading.Lock()
        if table is None:
            self._temporary = tempfile.TemporaryDirectory()
            table = Path(self._temporary.name, "trials.csv")
        self.table, self._claims = table, open(table.with_suffix(".running"), "a")  # noqa: SIM115
        with self._lock, locked(self.table.parent):
            self.study = self._open()
            self._note()

    @property
    def trials(self) -> list[Trial]:
        """All trials so far, those of other processes among them."""
        return [Trial(**kept.user_attrs["trial"]) for kept in self.study.get_trials(deepcopy=False)]

    @property
    def best(self) -> Trial | None:
        """The trial of the best validation score, the first of equals."""
        done = [trial for trial in self.trials if trial.status == "done"]
        return max(done, key=lambda trial: (trial.score or 0.0) * (1 if self.bigger else -1), default=None)

    def run(self) -> None:
        """Run the trials that are left and that no other process runs; a UserError says that all failed."""
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
                told = f"{trial.status}: {trial.error}"
                if trial.status == "done":
                    told = f"Valid result:\n{dict2str(trial.valid)}\nTest result:\n{dict2str(trial.test)}"
                file.write(f"{self.params2str(trial.params)}\n{told}\n\n")

    @staticmethod
    def params2str(params: Mapping[str, Any]) -> str:
        """Values as RecBole writes them."""
        return ", ".join(f"{name}:{value}" for name, value in params.items())

    def plot(self, path: Path, metric: str = "validation score") -> None:
        """Draw the score of each trial, and the best so far."""
        done = [(trial.number, trial.score) for trial in self.trials if trial.status == "done"]
        numbers, scores = zip(*done) if done else ((), ())
        with figure(path) as drawn:
            axes = drawn.subplots()
            axes.plot(numbers, scores, "o", label="trial")
            best = (np.maximum if self.bigger else np.minimum).accumulate(scores)
            axes.step(numbers, best, where="post", label="best so far")
            axes.set(xlabel="trial", ylabel=metric)
            axes.legend()

    def _work(self) -> None:
        """Run one trial after the other until none is left."""
        while not self.stopping and (trial := self._next()):
            kept = self.study.get_trials(deepcopy=False)[trial.number - 1]
            handle = optuna().trial.Trial(self.study, kept._trial_id)
            reporting = [handle] if self.prune else []
            try:
                result = self.objective_function(dict(trial.params), self.fixed_config_file_list, *reporting)
                trial.score, trial.seconds = float(result["best_valid_score"]), result.get("seconds")
                if not math.isfinite(trial.score):
                    raise UserError(f"the validation score is {trial.score}")
                trial.valid = {name: float(value) for name, value in (result["best_valid_result"] or {}).items()}
                trial.test = {name: float(value) for name, value in (result["test_result"] or {}).items()}
                trial.status = "done"
            except optuna().TrialPruned:
                reported = self.study.get_trials(deepcopy=False)[kept.number].intermediate_values.values()
                trial.status, trial.score = "pruned", (max if self.bigger else min)(reported)
            except Exception as error:
                error = error if isinstance(error, UserError) else UserError(f"{type(error).__name__}: {error}")
                trial.status, trial.score, trial.error = "failed", None, str(error)
            with self._lock, locked(self.table.parent):
                handle.set_user_attr("trial", vars(trial))
                if trial.status == "done":
                    self.study.tell(handle, trial.score)
                elif trial.status == "pruned":
                    self.study.tell(handle, state=optuna().trial.TrialState.PRUNED)
                self._note()
                self.after(trial)

    def _next(self) -> Trial | None:
        """Begin the next trial: one that was interrupted or had failed, else a new one; None where none is left."""
        with self._lock, locked(self.table.parent):
            trials = self.trials
            again = (t for t in trials if t.status == "running" or (t.status == "failed" and t.number in self._failed))
            left = (t for t in again if t.number not in self._begun and claim(self._claims, t.number))
            if trial := next(left, None):
                trial = Trial(trial.number, trial.params)
            elif params := self._propose(trials):
                trial = Trial(len(trials) + 1, params)
                self.study.add_trial(self.search.frozen(trial))
                claim(self._claims, trial.number)
            else:
                return None
            self._begun.add(trial.number)
            self._note()
            return trial

    def _propose(self, trials: list[Trial]) -> dict[str, Any] | None:
        """The values of a new trial, unless there are enough or the last ones brought no progress."""
        ended = [trial.number for trial in trials if trial.status != "running"]
        patience, best = self.early_stop, self.best
        stale = patience is not None and best is not None and len(ended) - 1 - ended.index(best.number) >= patience
        return None if stale or len(trials) >= self.max_evals else self.search.propose(trials, self.bigger)

    def _note(self) -> None:
        """Write the table, and bring RecBole's attributes up to date."""
        trials, best = self.trials, self.best
        if trials:
            write_trials(self.table, trials, self.space)
        done = [trial for trial in trials if trial.status == "done"]
        self.best_params, self.best_score = best and best.params, best and best.score
        self.best_test_result = best and best.test
        self.score_list = [trial.score for trial in done]
        self.params_list = [self.params2str(trial.params) for trial in done]
        results = [{"best_valid_result": trial.valid, "test_result": trial.test} for trial in done]
        self.params2result = dict(zip(self.params_list, results))

    def _open(self) -> Any:
        """The study in the journal, which is made from the table if only that is there, as of 0.1.0."""
        pruners, journal = optuna().pruners, self.table.with_suffix(".journal")

        def study(path: Path) -> Any:
            return optuna().create_study(
                study_name="tune",
                storage=optuna().storages.JournalStorage(Journal(path)),
                load_if_exists=True,
                direction="maximize" if self.bigger else "minimize",
                pruner=pruners.MedianPruner(n_warmup_steps=self.prune) if self.prune else pruners.NopPruner(),
            )

        if not journal.is_file():
            trials = [self.search.frozen(trial) for trial in read_trials(self.table, self.space)]
            with whole(journal) as new:
                study(new).add_trials(trials)
        try:
            return study(journal)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{journal}: damaged ({error}); move it away, and {self.table} takes its place") from error
