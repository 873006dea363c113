"""Options as users type them: ``--key=value`` on a command line, and the value that its text stands for."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from recbole_ssm.errors import UserError


def join_values(arguments: list[str]) -> list[str]:
    """``["-m", "SASRec", "--a", "1", "--b=2"]`` -> ``["--model=SASRec", "--a=1", "--b=2"]``."""
    short = {"-m": "--model", "-d": "--dataset"}
    joined: list[str] = []
    waiting = False
    for argument in arguments:
        if waiting:
            joined[-1] += f"={argument}"
            waiting = False
            continue
        argument = short.get(argument, argument)
        joined.append(argument)
        waiting = argument.startswith("--") and "=" not in argument
    if waiting:
        raise UserError(f"{joined[-1]} has no value; options look like {joined[-1]}=VALUE")
    return joined


def literal(text: str) -> Any:
    """The value that a string stands for, as RecBole reads it, but through literals only: nothing is evaluated.

    ``"1e-3"``, ``"[1, 5]"``, ``"{'a': 1}"`` and ``"None"`` become values, ``"true"`` and ``"false"`` too in any case;
    anything else stays the string.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def names(text: str) -> list[str]:
    """``"SASRec, Mamba4Rec"`` -> ``["SASRec", "Mamba4Rec"]``; blanks around a name and empty names do not count."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_options(arguments: Iterable[str]) -> dict[str, Any]:
    """``["--key=value", ...]`` -> a dict of options.

    Raises:
        UserError: an argument is of another form, or a key stands twice with different values.
    """
    options: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or not key:
            raise UserError(f"'{argument}' is not an option; options look like --learning_rate=0.001")
        if options.setdefault(key, value) != value:
            raise UserError(f"--{key} is given twice, as {options[key]} and as {value}; keep one")
    return {key: literal(value) for key, value in options.items()}
