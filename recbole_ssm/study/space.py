"""Search spaces in RecBole's form, a line a key: ``learning_rate choice [0.001, 0.003]``."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recbole_ssm.errors import UserError


class Space(NamedTuple):
    """Keys with what they may be: (kind, values) by key."""

    keys: dict[str, tuple[str, Any]]

    def sample(self, random: np.random.Generator) -> dict[str, Any]:
        """A value for every key, drawn independently."""
        found: dict[str, Any] = {}
        for key, (kind, values) in self.keys.items():
            if kind == "choice":
                found[key] = values[int(random.integers(len(values)))]
                continue
            value = float(random.uniform(values[0], values[1]))
            if kind == "loguniform":
                value = math.exp(value)
            elif kind == "quniform":
                value = round(value / values[2]) * values[2]
            found[key] = value
        return found


def read_space(path: Path) -> Space:
    """Read a ``.hyper`` file as RecBole's HyperTuning does, but through literals only.

    Raises:
        UserError: there is no such file, or a line of it is of no form that RecBole knows.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"search space {path}: {error.strerror}") from error
    keys: dict[str, tuple[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split(None, 2)
        if not words:
            continue
        try:
            key, kind, text = words
            values = ast.literal_eval(text)
            if len(values) < {"choice": 1, "uniform": 2, "loguniform": 2, "quniform": 3}[kind]:
                raise ValueError
        except (ValueError, SyntaxError, TypeError, KeyError):
            raise UserError(
                f"search space {path}, line {number}: '{line}' is not 'key choice [a, b]', 'key uniform low, high', "
                "'key loguniform low, high' or 'key quniform low, high, step'"
            ) from None
        keys[key] = (kind, values)
    return Space(keys)
