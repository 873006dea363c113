"""What callers ask of the engine about a user, what becomes of it, and the user meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from recbole_ssm.errors import UserError
from recbole_ssm.serving.catalogue import Ids, Recommendations
from recbole_ssm.serving.record import DamagedError, Record
from recbole_ssm.serving.served import Rules
from recbole_ssm.serving.session import Moments
from recbole_ssm.serving.store import StoreError

MOST_AHEAD = 86_400.0
"""Seconds by which an event's time may be beyond this machine's clock, whose zone another clock may have mistaken."""


def in_time(moment: float, user: str, now: float) -> float:
    """The time of an event.

    Raises:
        UserError: it has not come yet, so that all events until then would be late ones.
    """
    if moment > now + MOST_AHEAD:
        raise UserError(
            f"time: {moment:.0f}, of user {user!r}, is more than a day beyond the clock of this machine; give seconds "
            "since 1970, and set the clock right that they come from"
        )
    return moment


@dataclass(slots=True)
class Event:
    """A user's event."""

    item: str
    time: float | None = None
    """Seconds; None means now, after all that the user did before."""
    id: str | None = None
    """An event is taken once, as long as its id is among the user's newest."""


@dataclass(slots=True)
class Visit:
    """What one call asks about one user: the events are taken first, then the questions are answered."""

    user: str
    events: Sequence[Event] = ()
    k: int = 0
    """So many recommendations; 0 asks for none."""
    exclude_seen: bool = False
    rules: Rules | None = None
    candidates: Sequence[str] | None = None
    """Items whose scores are wanted."""
    now: float | None = None
    """The moment of asking in seconds, for a model that reads it; None means now."""
    forget: bool = False
    """Delete all that is kept of the user."""

    def moment(self, now: float) -> int:
        """The moment of asking in whole seconds, where it is asked ``now`` unless it says otherwise."""
        return math.floor(now if self.now is None else self.now)


@dataclass(slots=True)
class Visited:
    """What became of a visit."""

    model: str
    """The digest of the model that answered."""
    taken: int = 0
    repeated: int = 0
    """Events whose id was known, and which were not taken again."""
    skipped: int = 0
    """Events of items that the model does not know."""
    events: int = 0
    """How many events the user has now, those that are not kept any more included."""
    recommended: Recommendations | None = None
    scores: list[float] | None = None
    forgotten: bool = False
    """Whether there was anything to forget."""


@dataclass(slots=True)
class Guest:
    """A user while a visit lasts."""

    visit: Visit
    found: Visited
    record: Record = field(default_factory=Record)
    refused: Tensor | None = None
    """Items that the rules rule out."""
    candidates: Ids | None = None
    row: np.ndarray | None = None
    """The state, as a row of :class:`States`, or its vector only; None where no event of a known item is known."""
    asked: Moments | None = None
    """The times of the newest event and of asking, for a model that reads them."""
    had_state: bool = False
    """Whether a state was written, of whatever model, before this visit."""
    changed: bool = False
    error: Exception | None = None
    is_damaged: bool = False

    def damaged(self, error: DamagedError) -> None:
        """Answer that the record is damaged, or forget what is there of it."""
        self.is_damaged = True
        if self.visit.forget:
            self.changed = self.found.forgotten = True
        else:
            reason = f"the record of user {self.visit.user!r} is damaged ({error}); delete the user"
            self.error = StoreError(f"state: {reason}")
