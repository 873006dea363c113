"""Options as users write them: ``--key=value`` on a command line, ``key: value`` in a YAML file."""

from __future__ import annotations

import ast
import math
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date
from pathlib import Path, PurePath
from typing import Any

import yaml

from recbole_ssm.errors import UserError, did_you_mean, shown


def shipped(folder: str) -> Path:
    """A folder of files that come along: in a wheel within the package, in a clone beside it."""
    within = Path(__file__).parent / folder
    return within if within.is_dir() else Path(__file__).parent.parent / folder


PROPERTIES = shipped("properties")
TOY = shipped("dataset") / "toy"
"""The data set that is used where data_path holds no folder ``toy``."""
DEEPEST = 20
"""How deeply mappings and lists may be nested in a value."""
MOST_VALUES = 200_000
"""How many numbers, texts, lists and mappings a value may hold in all."""
MOST_MERGED = 10_000
"""No mapping of a YAML file may have more entries by ``<<``, so that a small file cannot become a large one."""


def join_values(arguments: list[str], flags: Collection[str] = ()) -> list[str]:
    """``["-m", "SASRec", "--a", "1", "--b=2"]`` -> ``["--model=SASRec", "--a=1", "--b=2"]``.

    The ``flags`` take no value, or take it after ``=`` alone.

    Raises:
        UserError: an option has no value. One that begins with ``--`` must stand behind ``=``.
    """
    short = {"-m": "--model", "-d": "--dataset"}
    joined: list[str] = []
    waiting = False
    for argument in arguments:
        argument = short.get(argument, argument)
        if waiting:
            if argument.startswith("--"):
                break
            joined[-1] += f"={argument}"
            waiting = False
            continue
        joined.append(argument)
        waiting = argument.startswith("--") and "=" not in argument and argument not in flags
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


def value_of(key: str, text: str) -> Any:
    """The value of a key that is given as text: a :func:`literal`, but a data set may be called 2020 or None."""
    return text if key == "dataset" else literal(text)


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
    return {key: value_of(key, value) for key, value in options.items()}


def plain(name: str, value: Any) -> Any:
    """A value in Python's own types: NumPy's scalars and arrays and PyTorch's tensors become numbers and lists.

    Raises:
        UserError: there is another type in it, or it is nested too deeply, or it never ends.
    """
    left = MOST_VALUES

    def convert(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > DEEPEST or left < 0:
            raise UserError(
                f"{name}: holds more than {DEEPEST} values one in the other, or more than {MOST_VALUES} in all"
            )
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, Mapping):
            return {key: convert(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([convert(entry, depth + 1) for entry in value])
        if isinstance(value, (PurePath, date)):
            # YAML makes dates of some text.
            return str(value)
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise UserError(f"{name}: must be text, a number, True, False, a list or a mapping, got {shown(value)}")

    return convert(value, 0)


class YamlLoader(yaml.SafeLoader):
    """YAML without code, which reads 1e-3 as a number as RecBole does, and takes a key once in a mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping; two entries of one name are an error that names both lines."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in lines and name not in ("", "<<"):
                problem = f"{name} stands in line {lines[name]} and again in line {line}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[name] = line
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Take in what ``<<`` names."""
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            problem = f"<< makes a mapping of {len(node.value)} entries"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        UserError: there is no such file, it is no YAML, or it holds something else than a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=YamlLoader)
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"config file {path}{where}: not valid YAML: {problem}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"config file {path}: must hold 'key: value' lines, got {type(content).__name__}")
    return content or {}


# Types of options, for ``add_argument(type=...)``. argparse puts the option's name before the message.


def at_least(least: int) -> Callable[[str], int]:
    """A whole number from ``least`` up."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a whole number, got {text}") from None
        if number < least:
            raise ArgumentTypeError(f"must be at least {least}, got {text}")
        return number

    return whole_number


def add_counts(parser: ArgumentParser, **options: tuple[int, str]) -> None:
    """Add options that take a whole number from 1 up, each as ``name=(default, help)``."""
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name}", type=at_least(1), default=default, help=text)


def sizes(text: str) -> list[int]:
    """Whole numbers from 1 up with commas between them; a number that is repeated counts once."""
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"must be whole numbers with commas, got {text}") from None
    if min(found) < 1:
        raise ArgumentTypeError(f"must be at least 1, got {text}")
    return list(dict.fromkeys(found))


def positive(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"must be above 0, got {text}")
    return number


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """One of the known names."""

    def name(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(f"'{text}' is not one of {', '.join(known)}{did_you_mean(text, known)}")
        return text

    return name


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Known names with commas between them, each once."""
    name = one_of(known)

    def some_names(text: str) -> list[str]:
        found = [name(part) for part in names(text)]
        if not found or len(set(found)) < len(found):
            raise ArgumentTypeError(f"must be one name or more, each once, got {text}")
        return found

    return some_names


def each_once(text: str) -> list[str]:
    """Names with commas between them."""
    found = [name.strip() for name in text.split(",")]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise ArgumentTypeError(f"{twice} stands twice")
    if "" in found:
        raise ArgumentTypeError(f"a name is missing in '{text}'")
    return found


def path_that(check: Callable[[Path], object]) -> Callable[[str], Path]:
    """A path that a check lets pass, such as :func:`recbole_ssm.files.check_writable`."""

    def path(text: str) -> Path:
        try:
            check(Path(text))
        except UserError as error:
            raise ArgumentTypeError(str(error)) from error
        return Path(text)

    return path


def module_of(kind: type) -> str:
    """The module by which a later command finds a class; for one of a script, that of the script from this folder."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if kind.__module__ != "__main__" or not script:
        return kind.__module__
    file = Path(script).resolve()
    parts = (file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else Path(file.name)).with_suffix("").parts
    return ".".join(parts) if all(part.isidentifier() for part in parts) else kind.__module__
