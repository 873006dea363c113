"""Errors that a user can mend: one line that names the key or file, the value and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something outside the program is wrong and its user can put it right.

    The command line prints the message as one line and exits with status 2; every other exception is a
    defect of ours and keeps its traceback.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'X'?"`` for the known name nearest to ``name``, or ``""`` if none is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else ""
