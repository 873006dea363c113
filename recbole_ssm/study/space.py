"""What hyper-parameters may be, read from RecBole's parameter files without evaluating them, and which to try next."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recbole_ssm.arguments import literal
from recbole_ssm.config import PROPERTIES
from recbole_ssm.errors import UserError, did_you_mean

ALGORITHMS = ("exhaustive", "random", "bayes")
KINDS = {"choice": "[a, b, ...]", "uniform": "low,high", "quniform": "low,high,step", "loguniform": "low,high"}
LARGEST_GRID = 1_000_000
STARTUP = 10  # random trials before the first that hyperopt proposes


@dataclass(frozen=True)
class Parameter:
    """One line of a parameter file."""

    name: str
    kind: str
    values: tuple[Any, ...]
    """The choices; else low, high, and for ``quniform`` the step."""
    where: str
    """File and line, for errors."""

    def grid(self) -> list[Any] | None:
        """All values in order; None where there is no end of them."""
        if self.kind == "choice":
            return list(self.values)
        if self.kind == "quniform":
            low, high, step = self.values
            return [self._rounded(n * step) for n in range(round(low / step), round(high / step) + 1)]
        return None

    def sample(self, rng: np.random.Generator) -> Any:
        """A random value, distributed as hyperopt's of that kind."""
        if self.kind == "choice":
            return self.values[rng.integers(len(self.values))]
        number = float(rng.uniform(*self.values[:2]))
        if self.kind == "quniform":
            return self._rounded(round(number / self.values[2]) * self.values[2])
        return math.exp(number) if self.kind == "loguniform" else number

    def expression(self) -> Any:
        """The parameter in hyperopt's terms."""
        from hyperopt import hp

        return getattr(hp, self.kind)(self.name, *([list(self.values)] if self.kind == "choice" else self.values))

    def from_hyperopt(self, number: float) -> Any:
        """The value that hyperopt means by a number: of choices it is the index."""
        if self.kind == "choice":
            return self.values[int(number)]
        return self._rounded(number) if self.kind == "quniform" else float(number)

    def to_hyperopt(self, value: Any) -> float:
        """The number that hyperopt knows a value by."""
        return next(n for n, v in enumerate(self.values) if cell(v) == cell(value)) if self.kind == "choice" else value

    def from_cell(self, text: str) -> Any:
        """The value that stands in a table as ``text``."""
        if self.kind == "choice":
            return next((value for value in self.values if cell(value) == text), literal(text))
        return literal(text)

    def _rounded(self, number: float) -> Any:
        """A multiple of the step without the noise of floats; whole where the bounds and the step are."""
        return int(number) if all(float(v).is_integer() for v in self.values) else round(number, 12)


Space = dict[str, Parameter]


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    return value if isinstance(value, str) else json.dumps(value)


def shipped_space(model: str) -> Path | None:
    """The file of the search space that ships for a model, if one does."""
    path = PROPERTIES / "hyper" / f"{model}.hyper"
    return path if path.is_file() else None


def read_space(path: Path) -> Space:
    """The parameters of a file in RecBole's format: a line for each, ``name type values``; # begins a line of comment.

    Raises:
        UserError: there is no such file, or a line is wrong; the message names it.
    """
    shipped = PROPERTIES / "hyper" / path.name
    if not path.is_file() and path.parent.name == "hyper" and shipped.is_file():
        path = shipped  # properties/hyper/X.hyper, said anywhere
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise UserError(f"params_file {path}: {reason}") from error
    space: Space = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path}, line {number}"
        words = line.split(None, 2)
        if len(words) < 3:
            raise UserError(
                f"{where}: must be 'name type values', such as 'dropout_prob choice [0.1, 0.2]', got '{line.strip()}'"
            )
        name, kind, text = words
        if name in space:
            raise UserError(f"{where}: {name} stands on {space[name].where.rpartition(', ')[2]} already; keep one")
        values = literal(text) if kind == "choice" else [literal(part) for part in text.split(",")]
        space[name] = _parameter(name, kind, values, where)
    if not space:
        raise UserError(f"params_file {path}: there is nothing to tune in it")
    return space


def space_of(params_dict: Mapping[str, Mapping[str, Any]]) -> Space:
    """The parameters of RecBole's ``params_dict``: ``{"choice": {"num_layers": [1, 2]}, "uniform": {...}}``.

    Raises:
        UserError: a kind or its values are wrong.
    """
    return {
        name: _parameter(name, kind, values, f"params_dict, {name}")
        for kind, parameters in params_dict.items()
        for name, values in parameters.items()
    }


def _parameter(name: str, kind: str, values: Any, where: str) -> Parameter:
    if kind not in KINDS:
        raise UserError(f"{where}: there is no type '{kind}'{did_you_mean(kind, KINDS)}; known are {', '.join(KINDS)}")
    if kind == "choice":
        if not isinstance(values, (list, tuple)) or not values or not _plain(list(values)):
            raise UserError(f"{where}: choice needs a list of literals such as [0.1, 0.2] or ['CE', 'BPR']")
        return Parameter(name, kind, tuple(json.loads(json.dumps(list(values)))), where)
    count = 3 if kind == "quniform" else 2
    numbers = list(values) if isinstance(values, (list, tuple)) else []
    if len(numbers) != count or not all(type(v) in (int, float) and math.isfinite(v) for v in numbers):
        raise UserError(f"{where}: {kind} needs {count} numbers as {KINDS[kind]}, got {values}")
    if numbers[0] >= numbers[1] or (count == 3 and numbers[2] <= 0):
        raise UserError(f"{where}: {kind} needs low < high{' and a step above 0' * (count == 3)}, got {values}")
    if kind == "loguniform" and (numbers[1] > 700 or 0 < numbers[0] < numbers[1] <= 0.1):
        low, high = (f"{math.log(bound):.4g}" if bound > 0 else "" for bound in numbers)
        hint = f"; for {numbers[0]} to {numbers[1]} write {low},{high}" if low else ""
        raise UserError(f"{where}: the bounds of loguniform are natural logarithms, got {values}{hint}")
    return Parameter(name, kind, tuple(numbers), where)


def _plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


@dataclass
class Trial:
    """One set of values, and what came of it."""

    number: int
    params: dict[str, Any]
    status: str = "running"
    """``running``, ``done`` or ``failed``."""
    score: float | None = None
    """The best validation score."""
    valid: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    """Of training, where the objective tells."""
    error: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{name}={cell(value)}" for name, value in self.params.items())


class Search:
    """Proposes values: a function of the seed, the number of the trial and the trials before it, so it can go on.

    Args:
        algo: ``exhaustive``, the grid in random order; ``random``; or ``bayes``, hyperopt's tree of Parzen estimators
            (Bergstra et al., NIPS 2011) after 10 random trials.
        space: the parameters.
        seed: of the random numbers.

    Raises:
        UserError: there is no such algorithm, the grid has no end, or hyperopt is not installed.
    """

    def __init__(self, algo: str, space: Space, seed: int) -> None:
        self.algo, self.space, self.seed = algo, space, seed
        self.size: int | None = None
        """Points of the grid; None where there is no end of them."""
        grids = {name: parameter.grid() for name, parameter in space.items()}
        if all(grid is not None for grid in grids.values()):
            self.size = math.prod(len(grid) for grid in grids.values() if grid is not None)
        if algo not in ALGORITHMS:
            raise UserError(f"algo: '{algo}' is not one of {', '.join(ALGORITHMS)}{did_you_mean(algo, ALGORITHMS)}")
        if algo == "exhaustive":
            for name, grid in grids.items():
                if grid is None:
                    parameter = space[name]
                    raise UserError(
                        f"{parameter.where}: there is no end of the values of {parameter.kind}; for an exhaustive "
                        "search take choice or quniform, or search with --algo=random or bayes"
                    )
            if self.size is None or self.size > LARGEST_GRID:
                raise UserError(f"algo: the grid has {self.size:,} points; search with --algo=random or bayes")
            self._grids: dict[str, list[Any]] = {name: grid or [] for name, grid in grids.items()}
            self._order = np.random.default_rng(seed).permutation(self.size)
        if algo == "bayes":
            try:
                import hyperopt  # noqa: F401
            except ImportError as error:
                raise UserError(
                    "algo: bayes needs hyperopt, which exhaustive and random do not; run: pip install hyperopt"
                ) from error

    def propose(self, trials: list[Trial], bigger: bool) -> dict[str, Any] | None:
        """The values of the next trial; None where nothing new is left.

        Args:
            trials: all so far.
            bigger: whether a higher score is better.
        """
        number = len(trials)
        if self.algo == "exhaustive":
            if number >= len(self._order):
                return None
            at = np.unravel_index(self._order[number], [len(grid) for grid in self._grids.values()])
            return {name: grid[i] for (name, grid), i in zip(self._grids.items(), at)}
        rng = np.random.default_rng([self.seed, number])
        seen = {str(trial) for trial in trials}
        done = [trial for trial in trials if trial.status == "done"]
        tries = 1000 if self.size is None or len(seen) < self.size else 0
        for attempt in range(tries):
            if self.algo == "bayes" and len(done) >= STARTUP and attempt < 10:
                params = self._parzen(done, bigger, number, int(rng.integers(2**31)))
            else:
                params = {name: parameter.sample(rng) for name, parameter in self.space.items()}
            if str(Trial(number, params)) not in seen:
                return params
        return None

    def _parzen(self, done: list[Trial], bigger: bool, number: int, seed: int) -> dict[str, Any]:
        """What hyperopt makes of the trials that are done."""
        from hyperopt import JOB_STATE_DONE, STATUS_OK, Trials, tpe
        from hyperopt.base import Domain

        domain = Domain(lambda params: 0.0, {name: parameter.expression() for name, parameter in self.space.items()})
        past = Trials()
        documents = []
        for trial in done:
            assert trial.score is not None
            values = {name: [self.space[name].to_hyperopt(value)] for name, value in trial.params.items()}
            misc = {"tid": trial.number, "cmd": domain.cmd, "workdir": None, "vals": values}
            misc["idxs"] = {name: [trial.number] for name in values}
            result = {"status": STATUS_OK, "loss": -trial.score if bigger else trial.score}
            (document,) = past.new_trial_docs([trial.number], [None], [result], [misc])
            documents.append({**document, "state": JOB_STATE_DONE})
        past.insert_trial_docs(documents)
        past.refresh()
        (proposal,) = tpe.suggest([number], domain, past, seed, n_startup_jobs=STARTUP)
        found = proposal["misc"]["vals"]
        return {name: parameter.from_hyperopt(found[name][0]) for name, parameter in self.space.items()}
