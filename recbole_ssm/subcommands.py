"""Commands that have commands of their own, such as ``recbole-ssm study NAME`` and ``recbole-ssm bench NAME``."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recbole_ssm.arguments import join_values, parse_options
from recbole_ssm.errors import ArgumentParser, UserError, did_you_mean


def choose(
    command: str,
    kind: str,
    usage: str,
    known: Mapping[str, str],
    modules: Mapping[str, str],
    arguments: Sequence[str],
    add_arguments: Callable[[ArgumentParser, str], None],
    with_keys: bool,
) -> tuple[Any, Namespace, dict[str, Any]] | None:
    """The module that a command's arguments name, its options, and the config keys among them.

    Args:
        command: such as ``bench``.
        kind: what its commands are, such as ``benchmark``.
        usage: what follows it in the help.
        known: name -> what it is about. The module of that name in the package ``recbole_ssm.<command>`` says its
            options by ``add_arguments(parser)``.
        modules: the names whose module has another name -> that name.
        arguments: of the command line, after the command.
        add_arguments: adds what all modules share; called with the parser and the name.
        with_keys: whether any other ``--key=value`` is a config key.

    Returns:
        None where only help was asked for; it is printed.

    Raises:
        UserError: no such name, no such option, or an impossible value.
    """
    lines = [f"{name}: {what}" for name, what in known.items()]
    if list(arguments) in (["--help"], ["-h"]):
        print(f"recbole-ssm {command} NAME {usage} [--help]\n", *lines, sep="\n  ")
        return None
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"{command}: name one of {'; '.join(lines)}")
    name, *rest = arguments
    if name not in known:
        raise UserError(f"{command}: there is no {kind} '{name}'{did_you_mean(name, known)}; {'; '.join(lines)}")
    module = importlib.import_module(f"recbole_ssm.{command}.{modules.get(name, name)}")
    parser = ArgumentParser(f"recbole-ssm {command} {name}", module.__doc__)
    add_arguments(parser, name)
    module.add_arguments(parser)
    if not with_keys:
        return module, parser.parse_args(rest), {}
    parser.epilog = "any other --key=value is a config key, for every run"
    # These may stand without a value.
    flags = {option for action in parser._actions if action.nargs in (0, "?") for option in action.option_strings}
    options, others = parser.parse_known_args(join_values(rest, flags))
    return module, options, parse_options(others)
