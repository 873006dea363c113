"""Many training runs, each done once.

A run is kept under a digest of all that decides its result (:mod:`recbole_ssm.study.identity`), so that a study can be
stopped anywhere and called again: what is done is read, what was interrupted goes on from its checkpoint, what failed
is tried again. Each run trains in a process of its own (:mod:`recbole_ssm.study.child`), which may crash or be killed
without harm to the others.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_ssm.config import Config
from recbole_ssm.console import progress_bar
from recbole_ssm.data import create_dataset
from recbole_ssm.errors import UserError
from recbole_ssm.files import digest, locked, write_json
from recbole_ssm.keys import KEYS
from recbole_ssm.llm.base import HUB_FILES
from recbole_ssm.memory import allocator_settings
from recbole_ssm.quick_start import configure
from recbole_ssm.study.cells import duration
from recbole_ssm.study.identity import Identity, Record, existing, reads, results_of
from recbole_ssm.study.outcome import OUTCOME, RUN, Outcome, Run
from recbole_ssm.trainer import checkpoint
from recbole_ssm.trainer.checkpoint import settings_of

NOT_CACHED = {name for name, key in KEYS.items() if not key.result}
"""The keys that change neither a run's result nor what is reported of it."""
LOG, CHECKPOINTS = "log.txt", "checkpoints"

Progress = Callable[[dict[str, Any]], None]


def ignore(state: Mapping[str, Any]) -> None:
    """A :data:`Progress` that does nothing."""


def runs_in(folder: Path, keys: Mapping[str, Any]) -> tuple[Runs, dict[str, Any]]:
    """The runs that a study keeps in its folder, and those of its config keys that decide results."""
    machine = {key: value for key, value in keys.items() if key in NOT_CACHED}
    return Runs(folder / "runs", machine), {key: value for key, value in keys.items() if key not in NOT_CACHED}


class Runs:
    """A folder of runs.

    Args:
        folder: where they lie; made if it is not there.
        machine_options: config keys of this machine, such as ``data_path`` and ``device``. They go along with every
            run, and those that change no result (:data:`NOT_CACHED`) are not part of the digest.
    """

    def __init__(self, folder: str | Path, machine_options: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.machine_options = {"data_path": "dataset/", **(machine_options or {})}
        self._files: dict[tuple[str, int, int], str] = {}
        self._records: dict[Path, Record] = {}
        self._defaults: dict[str, dict[str, Any]] = {}

    def content(self, run: Run) -> dict[str, Any]:
        """All that decides a run's result, as :meth:`identity` has it, whose errors it raises."""
        return self.identity(run).content

    def identity(self, run: Run) -> Identity:
        """What a run is to this version: :func:`recbole_ssm.study.identity.results_of`, the resolved settings, and
        digests of the data files, of the source of a model of the user's own, of a ranker's retriever and of a base
        model that is a folder or a file.

        Raises:
            UserError: the configuration is refused, or there is no such data set, or it cannot be read.
        """
        config = self.config(run)
        if run.model not in self._defaults:
            # No properties and no preset are of a data set of that name.
            self._defaults[run.model] = configure(run.model, "none").internal_config_dict
        said = {**config.internal_config_dict, **config.external_config_dict}
        chosen = {key for key, value in said.items() if value != self._defaults[run.model].get(key)}
        resolved = {key: value for key, value in settings_of(config).items() if key not in NOT_CACHED}
        emptied = {key for key in chosen if said[key] is None}
        settings = {key: value for key, value in resolved.items() if value is not None or key in emptied}
        try:
            files = self._digests(config)
        except OSError as error:
            raise UserError(f"{run.dataset}: {error.filename} cannot be read ({error.strerror})") from error
        content = {"version": results_of(settings), "settings": settings, "files": files}
        return Identity(content, set(resolved), chosen, partial(reads, config))

    def _digests(self, config: Config) -> dict[str, str]:
        """The digests of the files that a run reads."""
        self._fetch(config)
        folder = Path(config["data_path"])
        parts = [part for part in folder.glob(f"{glob.escape(config['dataset'])}.*") if reads(config, part.name)]
        files = {part.name: self._file_digest(part) for part in sorted(parts) if part.is_file()}
        files |= {f"model/{module}": self._file_digest(path) for module, path in config.own_files.items()}
        if config["retriever_checkpoint"] is not None:
            retriever = checkpoint.best_file(Path(config["retriever_checkpoint"]))
            if not retriever.is_file():
                raise UserError(f"retriever_checkpoint: there is no such file {retriever}")
            files["retriever_checkpoint"] = self._file_digest(retriever)
        if config["base_model"] is not None and (base := Path(str(config["base_model"])).expanduser()).exists():
            parts = [base] if base.is_file() else [part for name in HUB_FILES for part in base.glob(name)]
            files |= {f"base_model/{part.name}": self._file_digest(part) for part in sorted(parts)}
        return files

    def config(self, run: Run) -> Config:
        """A run's resolved configuration.

        Raises:
            UserError: it is refused.
        """
        return configure(run.model, run.dataset, config_dict={**self.machine_options, **run.options})

    def fetch(self, run: Run) -> None:
        """Download a run's data set if it is not there.

        Raises:
            UserError: it cannot be found.
        """
        self._fetch(self.config(run))

    def _fetch(self, config: Config) -> None:
        there = (Path(config["data_path"]) / f"{config['dataset']}.inter").is_file()
        if config["benchmark_filename"] is None and not there:
            # This downloads it.
            create_dataset(config)

    def contents(self, run: Run) -> Iterator[dict[str, Any]]:
        """:meth:`content`, and then the same in the words of the versions of the runs of this model and data set that
        lie here (:meth:`recbole_ssm.study.identity.Identity.as_said_by`).
        """
        now = self.identity(run)
        yield now.content
        for file in sorted(self.folder.glob(f"{glob.escape(run.stem)}*/{RUN}")):
            if (former := self._record(file)) and (content := now.as_said_by(former)):
                yield content

    def folder_of(self, run: Run) -> Path:
        """The folder in which a run is kept, or will be.

        Raises:
            UserError: as of :meth:`content`.
        """
        return existing(self.folder / run.stem, 16, self.contents(run))

    def get(self, run: Run, progress: Progress = ignore) -> Outcome:
        """Read a run's outcome, or train it now.

        Args:
            run: the run.
            progress: called with ``epoch``, ``epochs``, ``step``, ``steps`` and ``valid`` while it trains.

        A run that fails gives an outcome with ``error``, is not cached, and is tried again by the next call. Where
        another process trains the same run in the same folder, this one waits for it.

        Raises:
            KeyboardInterrupt: the run has saved where it stands.
        """
        try:
            folder = self.folder_of(run)
            if (folder / OUTCOME).is_file():
                try:
                    return replace(Outcome.read(folder), run=run)
                except UserError as error:
                    _set_aside(folder, error)
        except UserError as error:
            return Outcome(run, str(error), self.folder)
        except OSError as error:
            return Outcome(run, f"{error.filename or self.folder}: {error.strerror or error}", self.folder)
        failure = self._train(run, folder, progress)
        if failure is not None:
            return Outcome(run, failure, folder)
        return replace(Outcome.read(folder), run=run)

    def is_done(self, run: Run) -> bool:
        """Whether a run's outcome lies here."""
        try:
            return (self.folder_of(run) / OUTCOME).is_file()
        except (UserError, OSError):
            # :meth:`get` says why.
            return False

    def give_up(self, run: Run) -> None:
        """Delete the checkpoints of an interrupted run that shall not go on, unless another process is at it."""
        folder = self.folder_of(run)
        with contextlib.suppress(OSError), locked(folder, wait=False):
            shutil.rmtree(folder / CHECKPOINTS)

    def all(self, runs: Iterable[Run]) -> Iterator[Outcome]:
        """Get the outcomes of many runs, one after the other as they are asked for, with a line on standard error.

        Raises:
            KeyboardInterrupt: what is done is kept, and what was under way has saved where it stands.
        """
        todo = list(runs)
        # Wall seconds of what was trained now.
        spent: list[tuple[Run, float]] = []
        with progress_bar(total=len(todo), desc="runs", unit="run") as bar:
            for number, run in enumerate(todo, 1):
                bar.set_postfix_str(str(run))
                begin = time.monotonic()
                try:
                    outcome = self.get(run, partial(_show, bar, run))
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(
                        f"{number - 1} of {len(todo)} runs are done; go on by the same command"
                    ) from None
                took = time.monotonic() - begin
                words = [f"[{number}/{len(todo)}] {run}: {_score(outcome)}", "done before"]
                if outcome.error is not None or took > 2:
                    spent.append((run, took))
                    words[1] = duration(took)
                if left := _left(spent, todo[number:]):
                    words.append(f"about {duration(left)} left")
                bar.update()
                bar.write("; ".join(words), file=sys.stderr)
                yield outcome

    def _train(self, run: Run, folder: Path, progress: Progress) -> str | None:
        """Train a run in a process of its own; return why it failed, or None."""
        folder.mkdir(parents=True, exist_ok=True)
        # The process works in the run's folder, where RecBole writes its logs.
        given = {**self.machine_options, **run.options}
        options = {key: _absolute(run.model, key, value) for key, value in given.items()}
        options |= {"show_progress": False, "checkpoint_dir": str(folder / CHECKPOINTS)}
        record = self._record(folder / RUN)
        if record is None:
            now = self.identity(run)
            record = Record(now.content, sorted(now.known))
        write_json(folder / RUN, {"run": asdict(run), "options": options, **record._asdict()})
        said: dict[str, Any] = {}
        # A model of the user's own may lie in the working folder, where this process finds it first.
        entries = [*([""] if ":" in run.model else []), *sys.path]
        path = os.pathsep.join(str(Path(entry).absolute()) for entry in entries)
        with (
            open(folder / LOG, "ab") as log,
            subprocess.Popen(
                [sys.executable, "-m", "recbole_ssm.study.child", str(folder)],
                cwd=folder,
                env={**os.environ, **allocator_settings(), "PYTHONPATH": path},
                # The child stops when its parent does, by the end of this.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            ) as child,
        ):
            assert child.stdin is not None and child.stdout is not None
            try:
                for line in child.stdout:
                    try:
                        said = json.loads(line)
                    except ValueError:
                        # Some library's own words.
                        continue
                    progress(said)
            finally:
                child.stdin.close()
                child.stdout.close()
                child.wait()
        if child.returncode == 0:
            return None
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit status {child.returncode}"
        return said.get("error") or f"its process ended with {how}; see {folder / LOG}"

    def _record(self, file: Path) -> Record | None:
        if file not in self._records and (found := Record.read(file)):
            self._records[file] = found
        return self._records.get(file)

    def _file_digest(self, path: Path) -> str:
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns)
        if key not in self._files:
            self._files[key] = digest(path)
        return self._files[key]


def _set_aside(folder: Path, error: UserError) -> None:
    """Rename the folder of a damaged run, so that nothing in it is lost, unless another process has just done so."""
    names = (folder.with_name(f"damaged-{number}-{folder.name}") for number in itertools.count(1))
    with contextlib.suppress(FileNotFoundError):
        aside = folder.rename(next(name for name in names if not name.exists()))
        getLogger().warning(f"{error}; it is trained again, and the damaged one is now {aside.name}")


def _absolute(model: str, key: str, value: Any) -> Any:
    """An option that names a path as an absolute path, for a process in another folder; other values as they are."""
    if not isinstance(value, str) or value in ("", "random"):
        return value
    # Nobody says which keys of a user's own model name paths.
    own = ":" in model and key not in KEYS and (Path(value).is_file() or "/" in value)
    named = (own or key in ("retriever_checkpoint", "base_model")) and Path(value).exists()
    return str(Path(value).absolute()) if named or key == "data_path" else value


def _show(bar: Any, run: Run, state: Mapping[str, Any]) -> None:
    if "epoch" in state:
        valid = "" if state["valid"] is None else f", valid {state['valid']:.4f}"
        where = f"epoch {state['epoch']}/{state['epochs']}, step {state['step']}/{state['steps']}"
        bar.set_postfix_str(f"{run}: {where}{valid}")


def _score(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"failed: {outcome.error}"
    cutoff = list(outcome.test)[-1].partition("@")[2] if outcome.test else ""
    return ", ".join(f"{k} {v:.4f}" for k, v in outcome.test.items() if k.endswith(f"@{cutoff}")) or "no test"


def _left(spent: list[tuple[Run, float]], todo: list[Run]) -> float:
    """Estimate the seconds that are left, by runs of the same model and data set, or of the data set, or by all."""
    total = 0.0
    for run in todo if spent else ():
        alike = [seconds for done, seconds in spent if (done.model, done.dataset) == (run.model, run.dataset)]
        alike = alike or [seconds for done, seconds in spent if done.dataset == run.dataset] or [s for _, s in spent]
        total += sum(alike) / len(alike)
    return total
