"""What a model is asked about: a history with its times, and the moment of asking, in the model's terms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from recbole_ssm.data.times import LATEST, second_of
from recbole_ssm.errors import UserError, shown
from recbole_ssm.serving.catalogue import Catalogue, Ids

_NOTHING = object()


def by_number(part: str, number: int) -> str:
    """What an error calls a part of one of many histories: ``histories[0]``, ``times[0]``, ``exclude[0]``."""
    return f"{'histories' if part == 'history' else part}[{number}]"


def aligned(
    histories: Iterable[Any], name: str, entries: Iterable[Any] | None, otherwise: Any = None
) -> Iterator[tuple[Any, Any]]:
    """Histories, each with its entry of a list; with ``otherwise`` where there is no list.

    Raises:
        UserError: the list has not one entry for each history.
    """
    if entries is None:
        yield from zip(histories, itertools.repeat(otherwise))
        return
    for history, entry in itertools.zip_longest(histories, entries, fillvalue=_NOTHING):
        if history is _NOTHING or entry is _NOTHING:
            count = "fewer" if entry is _NOTHING else "more"
            raise UserError(f"{name}: has {count} entries than there are histories; give one for each")
        yield history, entry


class Asked(NamedTuple):
    """One history."""

    ids: Ids
    """The items that are known, oldest first."""
    skipped: int
    """How many are not."""
    times: list[int] | None
    """When the known ones were, in seconds; None where nobody says it and the model does not read it."""
    now: int | None
    """When it is asked what comes next, in seconds; None likewise."""


class Reader:
    """Reads histories, times and moments as callers give them, and says what a model of times misses.

    Args:
        model: what reads times has a ``time_encoding``.
        catalogue: its items.
    """

    def __init__(self, model: Any, catalogue: Catalogue) -> None:
        encoding = getattr(model, "time_encoding", None)
        self._catalogue = catalogue
        self.reads_times = encoding is not None
        self.asks = encoding is not None and encoding.asks

    def histories(
        self,
        histories: Iterable[Iterable[Any]],
        times: Any,
        now: Any,
        called: Callable[[str, int], str],
        skip_unknown: bool,
    ) -> Iterator[Asked]:
        """Many histories, one after the other.

        Args:
            histories: item tokens of each.
            times: those of each history, or None.
            now: one moment for all, or a list of one for each.
            called: what an error calls the ``history`` or the ``times`` of a number, such as :func:`by_number`.
            skip_unknown: leave unknown items out.
        """
        several = isinstance(now, (list, tuple, np.ndarray))
        timed = aligned(aligned(histories, "times", times), "now", now if several else None, otherwise=now)
        for number, ((tokens, moments), moment) in enumerate(timed):
            names = {"what": called("history", number), "times_named": called("times", number)}
            yield self.history(tokens, moments, moment, **names, skip_unknown=skip_unknown)

    def history(self, tokens: Iterable[Any], times: Any = None, now: Any = None, **names: Any) -> Asked:
        """One history.

        Args:
            tokens: item tokens, oldest first.
            times: when each of them was: seconds since 1970, or what else :func:`second_of` reads.
            now: the moment of asking.
            **names: as of :meth:`events`.

        Raises:
            UserError: an item is unknown, a time is none, there are not as many of them as items, or the model reads
                something that is not given.
        """
        ids, skipped, seconds = self.events(tokens, times, **names)
        # Nobody is told when to answer who has no history.
        moment = self.moment(now) if ids else None
        if moment is None and seconds:
            moment = seconds[-1]
        return Asked(ids, skipped, seconds, moment)

    def events(
        self,
        tokens: Iterable[Any],
        times: Any,
        *,
        what: str = "history",
        times_named: str = "times",
        skip_unknown: bool = False,
    ) -> tuple[Ids, int, list[int] | None]:
        """The known items of a history, how many are not known, and the times of the known ones. A time before that of
        the event before it counts as that one.
        """
        places = self._catalogue.places(tokens, what, skip_unknown)
        ids = [index for index in places if index is not None]
        skipped = len(places) - len(ids)
        if times is None:
            if self.reads_times and ids:
                raise UserError(
                    f"{times_named}: this model reads the times of events; give one for each item of {what}, in "
                    "seconds since 1970"
                )
            return ids, skipped, None
        if isinstance(times, (str, bytes)) or not isinstance(times, Iterable):
            raise UserError(f"{times_named}: must be a list with a time for each item, got {shown(times)}")
        seconds = [
            # Most are plain numbers of seconds.
            moment if type(moment) is int and abs(moment) < LATEST else second_of(f"{times_named}[{number}]", moment)
            for number, moment in enumerate(times)
        ]
        if len(seconds) != len(places):
            raise UserError(f"{times_named}: has {len(seconds)} times for the {len(places)} items of {what}")
        known = (second for second, index in zip(seconds, places) if index is not None)
        return ids, skipped, list(itertools.accumulate(known, max))

    def time(self, moment: Any) -> int | None:
        """The time of one more event.

        Raises:
            UserError: it is none, or it is not given and the model reads it.
        """
        if moment is None and self.reads_times:
            raise UserError("time: this model reads the times of events; give when this one was, in seconds since 1970")
        return None if moment is None else second_of("time", moment)

    def moment(self, now: Any) -> int | None:
        """The moment of asking.

        Raises:
            UserError: it is no time, or it is not given and the model reads it.
        """
        if now is None and self.asks:
            raise UserError(
                "now: this model reads how long ago the newest event was when it is asked; give the moment in seconds "
                "since 1970, such as time.time(), or as a datetime"
            )
        return None if now is None else second_of("now", now)
