"""What the commands share that take a checkpoint: its place, its model's class, and config keys behind them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from recbole_ssm.arguments import join_values, parse_options
from recbole_ssm.errors import ArgumentParser, UserError, did_you_mean
from recbole_ssm.keys import KEYS


def add_arguments(parser: ArgumentParser) -> None:
    """The checkpoint, and how to load it."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a .safetensors checkpoint, the folder of a run for its best, or the folder above for its newest run",
    )
    parser.add_argument("--model", help="the class of the model, package.module:Class, where it is one of your own")
    parser.add_argument("--device", help="where to run, such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.epilog = "any other --key=value is a config key that is to be another than in the run, such as --data_path"


def graphs_asked(command_line: Iterable[str]) -> bool:
    """Whether ``--cuda_graphs=True`` is among the config keys."""
    return parse_options(command_line).get("cuda_graphs") is True


def add_now(parser: ArgumentParser) -> None:
    """The moment of asking, which a model of ``time: query`` must know."""
    parser.add_argument(
        "--now",
        help="when it is asked, for a model of time: query: seconds since 1970, or a date such as 2001-02-03T04:05",
    )


def parse(
    parser: ArgumentParser,
    arguments: Sequence[str],
    flags: Collection[str] = (),
) -> tuple[Namespace, list[str]]:
    """The options of a command, and the config keys among the arguments.

    Args:
        parser: after :func:`add_arguments`.
        arguments: of the command line, after the command.
        flags: options that take no value.

    Raises:
        UserError: an option is wrong, or there is no checkpoint.
    """
    own = list(parser._option_string_actions)
    for name in (argument.partition("=")[0] for argument in arguments):
        if name not in own and f"--{name[2:].replace('-', '_')}" in own:
            raise UserError(f"{parser.prog}: there is no option {name}{did_you_mean(name, own)}")
    options, others = parser.parse_known_args(join_values(list(arguments), {"--help", "-h", *flags}))
    if strange := [other for other in others if not other.startswith("--")]:
        raise UserError(f"{parser.prog}: one checkpoint is taken, got {options.checkpoint} and {strange[0]}")
    for name in (other.partition("=")[0] for other in others):
        hint = did_you_mean(name, own)
        if hint and name.removeprefix("--") not in KEYS:
            raise UserError(f"{parser.prog}: there is no option {name}{hint}")
    return options, others
