"""What hyper-parameters may be, which to try next, and the table of what was tried."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from recbole_ssm.arguments import PROPERTIES, literal
from recbole_ssm.errors import UserError, did_you_mean, require
from recbole_ssm.files import write_csv
from recbole_ssm.keys import Span, row

ALGORITHMS = ("exhaustive", "random", "bayes")
ALIASES = {"grid": "exhaustive", "tpe": "bayes"}
KINDS = {"choice": "[a, b, ...]", "uniform": "low,high", "quniform": "low,high,step", "loguniform": "low,high"}
LARGEST_GRID = 100_000
# Random trials before the first that Optuna's sampler proposes.
STARTUP = 10
# `loss_type == 'gBCE'` or `loss_type in ['gBCE', 'CE']` after the values of a line.
CONDITION = re.compile(r"(.+)\sif\s+(\S+)\s*(==|\bin\b)\s*(.+)")
# A trial's status in Optuna's words, where one that failed stays open, because it will be tried again.
STATES = {"done": "COMPLETE", "pruned": "PRUNED", "failed": "RUNNING", "running": "RUNNING"}


def optuna() -> Any:
    """Import Optuna; where it is not installed, a :class:`UserError` says how to get it."""
    module = require("optuna", "tuning needs Optuna, which the extra 'tune' brings; run: pip install 'optuna>=4'")
    module.logging.set_verbosity(module.logging.WARNING)
    return module


@dataclass(frozen=True)
class Parameter:
    """One line of a parameter file."""

    name: str
    kind: str
    values: tuple[Any, ...]
    """The choices; else low, high, and for ``quniform`` the step."""
    where: str
    """File and line, for errors."""
    condition: tuple[str, list[Any]] | None = None
    """An earlier parameter and its values with which this one is tuned; with others it keeps its default."""

    def grid(self) -> list[Any] | None:
        """All values in order, or None where they cannot be counted."""
        if self.kind == "quniform":
            low, high, step = self.values
            return [self._rounded(n * step) for n in range(round(low / step), round(high / step) + 1)]
        return list(self.values) if self.kind == "choice" else None

    def own(self, value: Any) -> Any:
        """A value in the parameter's own form; a ValueError says that it has no such value."""
        if self.kind == "choice":
            same = [choice for choice in self.values if _same(choice, value)]
        elif type(value) not in (int, float):
            same = []
        elif grid := self.grid():
            same = [point for point in grid if point == value]
        else:
            low, high = self._bounds()
            # A logarithm and back may move a bound by its last digit.
            inside = min(max(value, low), high)
            same = [inside] if math.isclose(inside, value) else []
        if not same:
            raise ValueError(f"{self.name} has no value {cell(value)}")
        return same[0]

    def sample(self, rng: np.random.Generator) -> Any:
        """A random value; the logarithm of a ``loguniform`` one is uniform."""
        if self.kind == "choice":
            return self.values[rng.integers(len(self.values))]
        number = float(rng.uniform(*self.values[:2]))
        if self.kind == "quniform":
            return self._rounded(round(number / self.values[2]) * self.values[2])
        return math.exp(number) if self.kind == "loguniform" else number

    def distribution(self) -> Any:
        """The parameter in Optuna's terms, where a choice is known by its JSON."""
        kinds = optuna().distributions
        if self.kind == "choice":
            return kinds.CategoricalDistribution([json.dumps(value) for value in self.values])
        if grid := self.grid():
            number = kinds.IntDistribution if isinstance(grid[0], int) else kinds.FloatDistribution
            return number(grid[0], grid[-1], step=self._rounded(self.values[2]))
        return kinds.FloatDistribution(*self._bounds(), log=self.kind == "loguniform")

    def from_optuna(self, value: Any) -> Any:
        """The value that Optuna means."""
        value = json.loads(value) if self.kind == "choice" else value
        return self._rounded(value) if self.kind == "quniform" else value

    def from_cell(self, text: str) -> Any:
        """The value that stands in a table as ``text``."""
        choices = self.values if self.kind == "choice" else ()
        return next((value for value in choices if cell(value) == text), literal(text))

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Whether the parameter is tuned beside these values of earlier ones."""
        name, values = self.condition or (None, [])
        return name is None or (name in params and cell(params[name]) in map(cell, values))

    def _bounds(self) -> list[float]:
        """The least and the largest number of a range without steps."""
        return [math.exp(bound) if self.kind == "loguniform" else bound for bound in self.values]

    def _rounded(self, number: float) -> Any:
        """A multiple of the step without the noise of floats, and an int where the bounds and the step are whole."""
        return int(number) if all(float(v).is_integer() for v in self.values) else round(number, 12)


Space = dict[str, Parameter]


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    return value if isinstance(value, str) else json.dumps(value)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are one; 1 and 1.0 are, 1 and True are not."""
    numbers = type(one) in (int, float) and type(other) in (int, float)
    return bool(one == other) if numbers else cell(one) == cell(other)


def values(space: Space, value: Callable[[Parameter], Any]) -> dict[str, Any]:
    """The value of each parameter whose condition holds beside those before it."""
    params: dict[str, Any] = {}
    for name, parameter in space.items():
        if parameter.holds(params):
            params[name] = value(parameter)
    return params


def shipped_space(model: str) -> Path | None:
    """The file of the search space that ships for a model, if one does."""
    path = PROPERTIES / "hyper" / f"{model}.hyper"
    return path if path.is_file() else None


def read_space(path: Path) -> Space:
    """The parameters of a file, as ``recbole-ssm tune --help`` shows one; a UserError names the line that is wrong."""
    if not path.is_file() and path.parent.name == "hyper":
        # "properties/hyper/X.hyper" means the shipped file from any folder.
        path = shipped_space(path.stem) or path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"params_file {path}: {getattr(error, 'strerror', 'is not UTF-8')}") from error
    space: Space = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            parameter = _parsed(line, f"{path}, line {number}", space)
            space[parameter.name] = parameter
    if not space:
        raise UserError(f"params_file {path}: there is nothing to tune in it")
    return space


def space_of(params_dict: Mapping[str, Mapping[str, Any]]) -> Space:
    """The parameters of RecBole's ``params_dict``: ``{"choice": {"num_layers": [1, 2]}, "uniform": {...}}``."""
    given = [(name, kind, values) for kind, names in params_dict.items() for name, values in names.items()]
    return {name: _parameter(name, kind, values, f"params_dict, {name}") for name, kind, values in given}


def _parsed(line: str, where: str, space: Space) -> Parameter:
    """The parameter of a line that follows those of ``space``."""
    condition = None
    # A choice that holds such words is one literal with them.
    if isinstance(literal(line.split(None, 2)[-1]), str) and (found := CONDITION.fullmatch(line)):
        line, parent, sign, text = found.groups()
        if parent not in space:
            hint = did_you_mean(parent, space)
            raise UserError(f"{where}: the condition's '{parent}' must be tuned on an earlier line{hint}")
        wanted = [literal(text)] if sign == "==" else literal(text)
        known = [cell(value) for value in space[parent].grid() or ()]
        if not isinstance(wanted, list) or not _plain(wanted) or (known and not {*map(cell, wanted)} <= {*known}):
            raise UserError(f"{where}: the condition must name values of {parent}, such as {' and '.join(known[:2])}")
        condition = parent, wanted
    name, kind, text = [*line.split(None, 2), "", ""][:3]
    key = row(name)
    if not kind and key and isinstance(key.tune, Span):
        low, high, log = key.tune
        kind, values = ("loguniform", [math.log(low), math.log(high)]) if log else ("uniform", [low, high])
    elif not kind and key and key.tune:
        kind, values = "choice", list(key.tune)
    elif not text:
        raise UserError(f"{where}: must be 'name type values', such as 'dropout_prob choice [0.1, 0.2]', got '{line}'")
    else:
        values = literal(text) if kind == "choice" else [literal(part) for part in text.split(",")]
    if name in space:
        raise UserError(f"{where}: {name} stands on {space[name].where.rpartition(', ')[2]} already; keep one")
    return replace(_parameter(name, kind, values, where), condition=condition)


def _parameter(name: str, kind: str, values: Any, where: str) -> Parameter:
    """A parameter whose kind and values are checked."""
    if kind not in KINDS:
        raise UserError(f"{where}: there is no type '{kind}'{did_you_mean(kind, KINDS)}; known are {', '.join(KINDS)}")
    values = list(values) if isinstance(values, (list, tuple)) else []
    given = f"{values}" if values else "something else"
    if kind == "choice":
        if not values or not _plain(values):
            raise UserError(f"{where}: choice needs a list of literals such as [0.1, 0.2] or ['CE', 'BPR']")
        return Parameter(name, kind, tuple(json.loads(json.dumps(values))), where)
    count = 3 if kind == "quniform" else 2
    if len(values) != count or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise UserError(f"{where}: {kind} needs {count} numbers as {KINDS[kind]}, got {given}")
    if values[0] >= values[1] or (count == 3 and values[2] <= 0):
        raise UserError(f"{where}: {kind} needs low < high{' and a step above 0' * (count == 3)}, got {given}")
    if kind == "loguniform" and (values[1] > 700 or 0 < values[0] < values[1] <= 0.1):
        low, high = (f"{math.log(bound):.4g}" if bound > 0 else "" for bound in values)
        hint = f"; for {values[0]} to {values[1]} write {low},{high}" if low else ""
        raise UserError(f"{where}: the bounds of loguniform are natural logarithms, got {values}{hint}")
    return Parameter(name, kind, tuple(values), where)


def _plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return False


@dataclass
class Trial:
    """One set of values, and what came of it: ``running``, ``done``, ``pruned`` (with its best score) or ``failed``."""

    number: int
    params: dict[str, Any]
    status: str = "running"
    score: float | None = None
    valid: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    error: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{name}={cell(value)}" for name, value in self.params.items())


class Search:
    """Proposes values as a function of the seed and the trials so far, so a search that was stopped can go on.

    ``algo`` is ``exhaustive`` (``grid``), all points in random order; ``random``; or ``bayes`` (``tpe``), Optuna's
    tree-structured Parzen estimator (Bergstra et al., NIPS 2011) after 10 trials as of ``random``. ``start`` has the
    values that the latter two try next, if the space has them and no trial has had them. A UserError says that there is
    no such algorithm, that the grid is too large or has no end, or that Optuna is not installed.
    """

    def __init__(self, algo: str, space: Space, seed: int, start: Mapping[str, Any] | None = None) -> None:
        self.algo, self.space, self.seed = ALIASES.get(algo, algo), space, seed
        self.start: dict[str, Any] | None = None
        """The values to try next; None where nobody named them or the space does not have them."""
        if self.algo not in ALGORITHMS:
            raise UserError(f"algo: '{algo}' is not one of {', '.join(ALGORITHMS)}{did_you_mean(algo, ALGORITHMS)}")
        grids = [parameter.grid() for parameter in space.values()]
        self.size = None if None in grids else math.prod(len(grid or ()) for grid in grids)
        """Points of the grid; None where they cannot be counted. Conditions count in an exhaustive search alone."""
        if self.algo == "exhaustive":
            self._points = self._grid()
            self.size = len(self._points)
            return
        if self.algo == "bayes":
            optuna()
        # A value may also be one that no table can hold.
        with suppress(KeyError, ValueError, TypeError):
            self.start = values(space, lambda parameter: parameter.own((start or {})[parameter.name]))

    def propose(self, trials: Sequence[Trial], bigger: bool) -> dict[str, Any] | None:
        """The values of the trial after these, whose ``bigger`` scores are better; None where nothing new is left."""
        number = len(trials)
        if self.algo == "exhaustive":
            return self._points[number] if number < len(self._points) else None
        seen = {str(trial) for trial in trials}
        if self.start and str(Trial(number, self.start)) not in seen:
            return self.start
        rng = np.random.default_rng([self.seed, number])
        scored = sum(trial.score is not None for trial in trials)
        tries = 1000 if self.size is None or len(seen) < self.size else 0
        for attempt in range(tries):
            if self.algo == "bayes" and scored >= STARTUP and attempt < 10:
                params = self._parzen(trials, bigger, int(rng.integers(2**31)))
            else:
                params = values(self.space, lambda parameter: parameter.sample(rng))
            if str(Trial(number, params)) not in seen:
                return params
        return None

    def frozen(self, trial: Trial) -> Any:
        """A trial as Optuna's; our own form of it is a user attribute."""
        space = {name: self.space[name] for name in trial.params}
        choices = {name: json.dumps(trial.params[name]) for name in space if space[name].kind == "choice"}
        return optuna().trial.create_trial(
            state=optuna().trial.TrialState[STATES[trial.status]],
            value=trial.score,
            params={**trial.params, **choices},
            distributions={name: parameter.distribution() for name, parameter in space.items()},
            # By these Optuna compares trials that were pruned.
            intermediate_values={1: trial.score} if trial.status == "pruned" else None,
            user_attrs={"trial": vars(trial)},
        )

    def _grid(self) -> list[dict[str, Any]]:
        """All points in random order."""
        if self.size and self.size > LARGEST_GRID:
            raise UserError(f"algo: the grid has {self.size:,} points; search with --algo=random or bayes")
        points: list[dict[str, Any]] = [{}]
        for name, parameter in self.space.items():
            grid = parameter.grid()
            if grid is None:
                kind, mend = parameter.kind, "take choice or quniform, or search with --algo=random or bayes"
                raise UserError(f"{parameter.where}: there is no end of the values of {kind}; {mend}")
            each = [{name: value} for value in grid]
            points = [{**point, **more} for point in points for more in (each if parameter.holds(point) else [{}])]
        return [points[number] for number in np.random.default_rng(self.seed).permutation(len(points))]

    def _parzen(self, trials: Sequence[Trial], bigger: bool, seed: int) -> dict[str, Any]:
        """What Optuna's sampler makes of these trials, of which it is told no test metrics."""
        # Trials that run side by side keep away from each other.
        side_by_side = any(trial.score is None for trial in trials)
        sampler = optuna().samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, constant_liar=side_by_side)
        study = optuna().create_study(sampler=sampler, direction="maximize" if bigger else "minimize")
        study.add_trials([self.frozen(replace(trial, valid={}, test={})) for trial in trials])
        found = study.ask({name: parameter.distribution() for name, parameter in self.space.items()}).params
        return values(self.space, lambda parameter: parameter.from_optuna(found[parameter.name]))


def _column(name: str) -> str:
    """The column of a parameter in a table of trials; some keys are called as other columns are, such as ``score``."""
    return f"key {name}" if name in ("trial", "status", "score", "seconds", "error") else name


def write_trials(path: Path, trials: Sequence[Trial], space: Space) -> None:
    """The table of trials as comma-separated values, whole or not at all."""
    rows = [
        {"trial": trial.number, "status": trial.status, "score": trial.score}
        | {_column(name): cell(trial.params[name]) if name in trial.params else "" for name in space}
        | {f"valid {name}": value for name, value in trial.valid.items()}
        | {f"test {name}": value for name, value in trial.test.items()}
        | {"seconds": trial.seconds, "error": trial.error}
        for trial in trials
    ]
    write_csv(path, rows)


def read_trials(path: Path, space: Space) -> list[Trial]:
    """The trials of a table that :func:`write_trials` wrote; none where there is no table."""
    if not path.is_file():
        return []

    def trial(row: dict[str, str]) -> Trial:
        params = values(space, lambda parameter: parameter.from_cell(row[_column(parameter.name)]))
        score, seconds = (float(row[key]) if row[key] else None for key in ("score", "seconds"))
        valid, test = (
            {key.removeprefix(part): float(text) for key, text in row.items() if key.startswith(part) and text}
            for part in ("valid ", "test ")
        )
        return Trial(int(row["trial"]), params, row["status"], score, valid, test, seconds, row["error"])

    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(map(trial, csv.DictReader(file)))
    except (KeyError, ValueError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, or not a table of these parameters ({error}); move it away") from error
