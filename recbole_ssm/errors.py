"""Errors that a user can mend: one line that names the key or file, the value and the cure."""

from __future__ import annotations

import argparse
import difflib
import reprlib
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any, NoReturn

INSTALL_RECBOLE = "pip install --no-deps recbole==1.2.1"
"""RecBole pins an old release of ray, which nothing here needs and Python 3.12 and later cannot install."""
NO_RECBOLE = (
    f"RecBole is not installed; run: {INSTALL_RECBOLE}   "
    "(--no-deps, because RecBole pins an old release of ray, which nothing here needs)"
)
LONGEST = 900
"""Characters of a message; what it quotes may be of any length."""


_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 3, 6, 12, 12
_short.maxstring, _short.maxother, _short.maxlong = 120, 120, 40


class UserError(ValueError):
    """Something outside the program is wrong and its user can put it right.

    The command line prints the message as one line and exits with status 2; every other exception is a
    defect of ours and keeps its traceback. Line ends, as a name or another library's message may hold, become spaces.
    """

    def __init__(self, message: str) -> None:
        text = " ".join(message.splitlines())
        super().__init__(text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'X'?"`` for the known name nearest to ``name``, or ``""`` if none is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    # A name that is much longer than all others is near to none, and comparing it would take long.
    near = difflib.get_close_matches(name[:100].lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else ""


def require(package: str, message: str = "") -> Any:
    """Import a package that is not always installed.

    Raises:
        UserError: it cannot be imported; by default the message is the line that installs it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise UserError(message or f"{name} is needed and cannot be imported ({error}); pip install {name}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, behind the name of its class where it is not made for users."""
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def shown(value: Any) -> str:
    """A value as an error shows it: its repr, shortened."""
    try:
        return _short.repr(value)
    except ValueError:
        # Python writes out no whole number of more than some thousand digits.
        return "a number of thousands of digits"


def excerpt(text: str) -> str:
    """A value in a message, as Python spells it: of a long one only the beginning."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names with commas between them; of many only the first, and how many there are."""
    known = [name[:60] for name in names]
    return ", ".join(known) if len(known) <= most else f"{', '.join(known[:most])} ... ({len(known):,} in all)"


class _Help(argparse.HelpFormatter):
    """Help that gives the default of each option, where its text does not speak of it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        known = action.default in (None, "", argparse.SUPPRESS) or "default" in text
        return text if known else f"{text} (default: %(default)s)"


FORMER_OPTIONS = {"--batch": "--batch_size", "--max_length": "--length", "--top_k": "--k"}
"""What options were called before every command had the same word for the same thing."""


class ArgumentParser(argparse.ArgumentParser):
    """A parser of a command's arguments whose errors are :class:`UserError`; options are never abbreviated.

    A former name of an option still counts, with a hint on standard error.
    """

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=_Help)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, after options have their present names."""
        return super().parse_known_args(args and [self._by_present_name(argument) for argument in args], namespace)

    def _by_present_name(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        present = FORMER_OPTIONS.get(name, "")
        if name in self._option_string_actions or present not in self._option_string_actions:
            return argument
        print(f"{self.prog}: {name} is called {present} now; the old name still counts", file=sys.stderr)
        return present + equals + value

    def error(self, message: str) -> NoReturn:
        """Raise the message as a UserError."""
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")
