"""What a server does, without HTTP: takes events, keeps states, recommends. For one thread at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.errors import UserError
from recbole_ssm.serving.catalogue import Ids, Recommendations
from recbole_ssm.serving.recommender import MOST_SCORES
from recbole_ssm.serving.record import (
    EVENT_IDS,
    STATE_TYPES,
    DamagedError,
    Record,
    decoded,
    digest_and_change,
    packed_state,
    unpacked_state,
)
from recbole_ssm.serving.served import Rules, Served
from recbole_ssm.serving.store import Store, StoreError, Values

LOOKED_AT_AT_ONCE, REBUILT_AT_ONCE = 64, 8
"""Users whose records are looked at, and whose states are computed again, before callers have their turn."""


@dataclass(slots=True)
class Event:
    """A user's event."""

    item: str
    time: float | None = None
    """Seconds; None means now, after all that the user did before."""
    id: str | None = None
    """An event whose id is among the user's newest is taken once."""


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
class _Guest:
    """A user while a visit lasts."""

    visit: Visit
    found: Visited
    record: Record = field(default_factory=Record)
    refused: Tensor | None = None
    """Items that the rules rule out."""
    candidates: Ids | None = None
    new: Ids = field(default_factory=list)
    """Items that the state has not read."""
    row: np.ndarray | None = None
    """The state, as a row of :class:`States`."""
    changed: bool = False
    error: Exception | None = None


class Engine:
    """Users' records in a store, and the model that is served.

    Args:
        served: the model.
        store: the records.
        state_history: so many events of a user are kept, the newest.
        state_type: ``float32``, or ``bf16``, which takes half and is accurate to three digits.
        forget_after: seconds without an event or a new state after which a user is forgotten; None means never.
        observe: told of each part of the work (``store``, ``step``, ``score``, ``top_k``) and its seconds.
        count: told what became of each state that was needed: ``stored``, ``rebuilt``, ``first``.
    """

    def __init__(
        self,
        served: Served,
        store: Store,
        *,
        state_history: int = 10_000,
        state_type: str = "float32",
        forget_after: float | None = None,
        observe: Callable[[str, float], None] = lambda part, seconds: None,
        count: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.served, self.store = served, store
        self._state_history, self._state_type = state_history, STATE_TYPES[state_type]
        self._forget_after = forget_after
        self._observe, self._count = observe, count
        self._stepping = 0.0

    # --- users ---

    def visit(self, visits: Sequence[Visit]) -> list[Visited | Exception]:
        """Do what many calls ask, together: one transaction, one step of all users, one product with all items.

        Args:
            visits: in the order in which they came. Those of one user are done one after the other.

        Returns:
            What became of each. A :class:`~recbole_ssm.serving.store.StoreError` or a ``UserError`` in its place means
            that nothing of this visit was taken.
        """
        results: dict[int, Visited | Exception] = {}
        waiting = dict(enumerate(visits))
        while waiting:
            first: dict[str, int] = {}
            for number, visit in waiting.items():
                first.setdefault(visit.user, number)
            numbers = list(first.values())
            results.update(zip(numbers, self._visit_once([waiting.pop(number) for number in numbers])))
        return [results[number] for number in range(len(visits))]

    def _visit_once(self, visits: Sequence[Visit]) -> Sequence[Visited | Exception]:
        """:meth:`visit` for visits of different users."""
        served, users = self.served, [visit.user for visit in visits]
        guests: list[_Guest] = []
        # The values that the guests are made from, and what is to be written in their place.
        made: tuple[Values, dict[str, bytes | None]] = {}, {}

        def change(values: Values) -> dict[str, bytes | None]:
            nonlocal made
            if values == made[0]:
                return made[1]
            now = time.time()
            guests[:] = [self._admit(served, visit, values[visit.user], now) for visit in visits]
            with self._timed("step"):
                self._bring_up(served, guests)
            changing = [guest for guest in guests if guest.changed and guest.error is None]
            made = values, {guest.visit.user: self._encoded(served, guest, now) for guest in changing}
            return made[1]

        begin, self._stepping = time.perf_counter(), 0.0
        try:
            writes = any(visit.events or visit.forget for visit in visits)
            if writes or change(self.store.get(users)):
                self.store.update(users, change)
        except StoreError as error:
            return [error] * len(visits)
        self._observe("store", time.perf_counter() - begin - self._stepping)
        self._answer(served, [guest for guest in guests if guest.error is None])
        return [guest.error or guest.found for guest in guests]

    def _admit(self, served: Served, visit: Visit, value: bytes | None, now: float) -> _Guest:
        """Read a user's record and take the events of a visit into it."""
        guest = _Guest(visit, Visited(served.digest))
        if visit.forget:
            guest.changed = guest.found.forgotten = value is not None
            return guest
        try:
            guest.refused = served.refused(visit.rules)
            if visit.candidates is not None:
                guest.candidates = served.catalogue.ids(visit.candidates, "items")
            if value is not None:
                guest.record = decoded(value)
        except DamagedError as error:
            guest.error = StoreError(f"state: the record of user {visit.user!r} is damaged ({error}); delete the user")
            return guest
        except UserError as error:
            guest.error = error
            return guest
        if self._forget_after is not None and guest.record.changed < now - self._forget_after:
            guest.record, guest.changed = Record(), value is not None
        for event in visit.events:
            self._take(served, guest, event, now)
        guest.record.keep(self._state_history)
        guest.found.events = guest.record.total
        return guest

    def _take(self, served: Served, guest: _Guest, event: Event, now: float) -> None:
        record, found = guest.record, guest.found
        if event.id is not None and event.id in record.event_ids:
            found.repeated += 1
            return
        ids, skipped = served.catalogue.known([event.item], "item", skip_unknown=True)
        found.skipped += skipped
        if not ids:
            return
        if event.id is not None:
            record.event_ids = [*record.event_ids[1 - EVENT_IDS :], event.id]
        newest = record.newest
        moment = max(now, newest) if event.time is None else event.time
        if moment < newest:
            record.insert(event.item, moment)
        else:
            record.append(event.item, moment)
            guest.new += ids
        found.taken += 1
        guest.changed = True

    def _bring_up(self, served: Served, guests: Sequence[_Guest]) -> None:
        """Let the state of each guest have read every event."""
        states = served.states
        if states is None:
            return
        stepping = []
        for guest in guests:
            record = guest.record
            if guest.visit.forget or guest.error is not None or not record.items:
                continue
            if self._is_usable(served, record):
                self._count("stored")
                guest.row = unpacked_state(record.state, record.state_type)
            elif len(guest.new) == record.total:
                self._count("first")
                guest.row = states.start()
            else:
                self._count("rebuilt")
                if ids := self._ids(served, record):
                    guest.row, guest.new, guest.changed = states.read(ids), [], True
                continue
            if guest.new:
                stepping.append(guest)
        while stepping:
            rows = states.step(_rows(stepping), [guest.new.pop(0) for guest in stepping])
            for guest, row in zip(stepping, rows):
                guest.row = row
            stepping = [guest for guest in stepping if guest.new]

    def _is_usable(self, served: Served, record: Record) -> bool:
        """Whether a record's state is of this model; that of another is never used."""
        size = 4 if record.state_type == STATE_TYPES["float32"] else 2
        return record.digest == served.key and len(record.state) == size * served.states.width  # type: ignore[union-attr]

    def _ids(self, served: Served, record: Record) -> Ids:
        return served.catalogue.known(record.items.texts(), "history", skip_unknown=True)[0]

    def _encoded(self, served: Served, guest: _Guest, now: float) -> bytes | None:
        record = guest.record
        if guest.visit.forget or not record.items:
            return None
        record.changed = now
        if guest.row is not None:
            record.state_type = self._state_type
            record.state, record.digest = packed_state(guest.row, self._state_type), served.key
        return record.encoded()

    # --- answers ---

    def _answer(self, served: Served, guests: Sequence[_Guest]) -> None:
        """Recommend to those who ask for it, and score what they want scored."""
        asking = [guest for guest in guests if guest.visit.k or guest.candidates is not None]
        at_once = max(1, MOST_SCORES // len(served.catalogue.items))
        for begin in range(0, len(asking), at_once):
            with torch.inference_mode():
                self._answer_some(served, asking[begin : begin + at_once])

    def _answer_some(self, served: Served, guests: Sequence[_Guest]) -> None:
        known = []
        for guest in guests:
            ids = self._ids(served, guest.record) if guest.visit.exclude_seen or not served.states else []
            if guest.row is not None or (ids and not served.states):
                known.append((guest, ids))
            else:
                self._answer_a_stranger(served, guest)
        if not known:
            return
        with self._timed("score"):
            if served.states is None:
                scores = self._scores(served, known)
            else:
                scores = served.states.scores(_rows([guest for guest, _ in known]))
        for (guest, _), row in zip(known, scores):
            if guest.candidates is not None:
                guest.found.scores = row[guest.candidates].tolist()
            if guest.refused is not None:
                row[guest.refused.to(row.device)] = -torch.inf
        if most := max(guest.visit.k for guest, _ in known):
            with self._timed("top_k"):
                excluded = [ids if guest.visit.exclude_seen else [] for guest, ids in known]
                best = served.catalogue.best(scores, most, excluded)
            for (guest, _), found in zip(known, best):
                if guest.visit.k:
                    guest.found.recommended = Recommendations(found[: guest.visit.k])

    def _scores(self, served: Served, known: Sequence[tuple[_Guest, Ids]]) -> Tensor:
        """The scores of a model that reads the events again."""
        ids = [ids for _, ids in known]
        if not served.recommender.reads_times:
            return served.recommender.scores(ids)
        times, moments = [], []
        for guest, _ in known:
            places = served.catalogue.places(guest.record.items.texts(), "history", True)
            times.append([int(time) for place, time in zip(places, guest.record.moments()) if place is not None])
            moments.append(int(time.time() if guest.visit.now is None else guest.visit.now))
        return served.recommender.scores(ids, times, moments)

    def _answer_a_stranger(self, served: Served, guest: _Guest) -> None:
        """Answer one of whom no event of a known item is known."""
        try:
            if guest.candidates is not None:
                raise UserError(f"user {guest.visit.user!r}: has no event of a known item, so nothing can be scored")
            guest.found.recommended = served.catalogue.popular(guest.visit.k, [], guest.refused)
        except UserError as error:
            guest.error = error

    # --- all users ---

    def tidy(self) -> Iterator[None]:
        """Go through all users once, some at a time: states of former models are computed again, and who was silent for
        ``forget_after`` is forgotten.
        """
        users = self.store.users()
        while piece := list(islice(users, LOOKED_AT_AT_ONCE)):
            stale = [user for user, value in self.store.get(piece).items() if value and self._is_stale(value)]
            for begin in range(0, len(stale), REBUILT_AT_ONCE):
                self.visit([Visit(user) for user in stale[begin : begin + REBUILT_AT_ONCE]])
                yield
            yield

    def _is_stale(self, value: bytes) -> bool:
        try:
            digest, changed = digest_and_change(value)
        except DamagedError:
            # Whoever asks for this user is told.
            return False
        is_old = self._forget_after is not None and changed < time.time() - self._forget_after
        return is_old or (self.served.states is not None and digest != self.served.key)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        if part == "step":
            self._stepping += seconds
        self._observe(part, seconds)


def _rows(guests: Sequence[_Guest]) -> np.ndarray:
    """The states of guests who have one ``[n, width]``."""
    return np.stack([np.asarray(guest.row) for guest in guests])
