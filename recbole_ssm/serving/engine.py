"""What a server does, without HTTP: takes events, keeps states, recommends. For one thread at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.errors import UserError
from recbole_ssm.serving.catalogue import Ids, Recommendations
from recbole_ssm.serving.recommender import MOST_SCORES
from recbole_ssm.serving.record import (
    EVENT_IDS,
    STATE_EVERY,
    STATE_TYPES,
    DamagedError,
    Get,
    Record,
    Values,
    checksum,
    decoded,
    state_key,
    unpacked_state,
)
from recbole_ssm.serving.served import Served
from recbole_ssm.serving.session import moments_of
from recbole_ssm.serving.states import Unread
from recbole_ssm.serving.store import Store, StoreError
from recbole_ssm.serving.visits import Guest, Visit, Visited, in_time

LOOKED_AT_AT_ONCE, REBUILT_AT_ONCE = 64, 8
"""Users whose records are looked at, and whose states are computed again, before callers have their turn."""
FEWEST = 3
"""The newest so many events of a user are kept in any case."""


class Engine:
    """Users' records in a store, and the model that is served.

    Args:
        served: the model.
        store: the records.
        state_history: so many events of a user are kept, the newest; three at least.
        state_type: ``float32``, or ``bf16``, which takes half and is accurate to three digits.
        forget_after: seconds without an event after which a user is forgotten; None means never.
        observe: told of each part of the work (``store``, ``step``, ``score``, ``top_k``) and its seconds.
        count: told of each state that was needed: ``stored``; ``rebuilt``, where it was lost or is of another model; or
            ``first``, where none was written yet.
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
        self._state_type = STATE_TYPES[state_type]
        # Events that a state has not read are kept, and the one before them, from which the first gap is counted.
        self._state_history = max(state_history, FEWEST)
        self._state_every = min(STATE_EVERY, self._state_history - 2)
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

    def visit_together(self, visits: Sequence[Visit], beside: Values) -> list[Visited]:
        """:meth:`visit` for visits of different users, all or nothing, and values that are written in one transaction
        with them.

        Raises:
            StoreError, UserError: a visit failed, or the store; nothing was written.
        """
        taken: list[Visited] = []
        for found in self._visit_once(visits, beside):
            if isinstance(found, Exception):
                raise found
            taken.append(found)
        return taken

    def _visit_once(self, visits: Sequence[Visit], beside: Values | None = None) -> Sequence[Visited | Exception]:
        """:meth:`visit` for visits of different users; all or nothing where values are to be written beside them."""
        served = self.served
        guests: list[Guest] = []
        # The values that the guests are made from, and what is to be written in their place.
        made: tuple[Values, Values] | None = None

        def change(get: Get) -> Values:
            nonlocal made
            if made is not None and get(list(made[0])) == made[0]:
                return made[1]
            read: Values = {}

            def getting(keys: Sequence[bytes]) -> Values:
                found = get(keys)
                read.update(found)
                return found

            now = time.time()
            heads = getting([visit.user.encode() for visit in visits])
            guests[:] = [self._admit(served, visit, heads[visit.user.encode()], getting, now) for visit in visits]
            with self._timed("step"):
                self._bring_up(served, guests, getting, now)
            for guest in guests if beside else ():
                if guest.error is not None:
                    raise guest.error
            made = read, dict(beside or {})
            for guest in guests:
                if guest.changed and guest.error is None:
                    made[1].update(self._writings(guest, now))
            return made[1]

        begin, self._stepping = time.perf_counter(), 0.0
        try:
            writes = any(visit.events or visit.forget for visit in visits)
            if writes or self.store.read(change):
                self.store.update(change)
        except StoreError as error:
            forgetting = [visit for visit in visits if visit.forget]
            if not error.full or beside or len(forgetting) in (0, len(visits)):
                return [error] * len(visits)
            # There is room to forget where there is none for what came with it.
            forgotten = iter(self._visit_once(forgetting))
            return [next(forgotten) if visit.forget else error for visit in visits]
        self._observe("store", time.perf_counter() - begin - self._stepping)
        self._answer(served, [guest for guest in guests if guest.error is None])
        return [guest.error or guest.found for guest in guests]

    def _admit(self, served: Served, visit: Visit, value: bytes | None, get: Get, now: float) -> Guest:
        """Read a user's record and take the events of a visit into it."""
        guest = Guest(visit, Visited(served.digest))
        try:
            guest.refused = served.refused(visit.rules)
            if visit.candidates is not None:
                guest.candidates = served.catalogue.ids(visit.candidates, "items")
            if value is not None:
                guest.record = decoded(value)
            if visit.forget:
                guest.changed = guest.found.forgotten = value is not None
                guest.record.clear()
                return guest
            if self._forget_after is not None and guest.record.changed < now - self._forget_after:
                guest.record.clear()
                guest.changed = value is not None
            guest.had_state = bool(guest.record.digest)
            self._take(served, guest, get, now)
            asks = visit.k or visit.candidates is not None
            if asks and (visit.exclude_seen or served.states is None):
                guest.record.load_older(visit.user, get)
        except DamagedError as error:
            guest.damaged(error)
        except UserError as error:
            guest.error = error
        guest.found.events = guest.record.total
        return guest

    def _take(self, served: Served, guest: Guest, get: Get, now: float) -> None:
        """Take the events of a visit into the record, but for unknown items and for those that were taken before."""
        record, found, events = guest.record, guest.found, guest.visit.events
        items: list[str] = []
        times: list[float] = []
        newest = record.newest
        for event in events:
            if event.id is not None and event.id in record.event_ids:
                found.repeated += 1
                continue
            ids, skipped = served.catalogue.known([event.item], "item", skip_unknown=True)
            found.skipped += skipped
            if not ids:
                continue
            moment = max(now, newest) if event.time is None else in_time(event.time, guest.visit.user, now)
            newest = max(newest, moment)
            items.append(event.item)
            times.append(moment)
            if event.id is not None:
                # A call that is sent again finds all of its ids, however many they are.
                kept = max(EVENT_IDS, len(events))
                record.event_ids = [*record.event_ids[1 - kept :], event.id]
        if items:
            if min(times) < record.oldest:
                record.load_older(guest.visit.user, get)
            record.add(items, times)
            found.taken, guest.changed = len(items), True

    def _bring_up(self, served: Served, guests: Sequence[Guest], get: Get, now: float) -> None:
        """Let the state of each guest have read every event, and ask it at its moment."""
        states = served.states
        if states is None:
            return
        guests = [guest for guest in guests if guest.error is None and guest.record.total]
        carried = [guest for guest in guests if guest.record.digest == served.key and not guest.record.state]
        stored = get([state_key(guest.visit.user) for guest in carried])
        stepping: list[tuple[Guest, Unread]] = []
        for guest in guests:
            record = guest.record
            guest.row = self._carried(served, record, stored.get(state_key(guest.visit.user)))
            lacking = "rebuilt" if guest.had_state else "first"
            self._count(lacking if guest.row is None else "stored")
            if guest.row is None and len(record.items) == record.total < STATE_EVERY:
                record.digest, record.read, record.state = b"", 0, b""
            elif guest.row is None:
                unread = self._rebuild(served, guest, get, now)
                if unread.ids and states.tried:
                    stepping.append((guest, Unread(unread.ids[-1:], unread.moments[-1:], unread.behind)))
                continue
            try:
                unread = self._unread(served, guest, record.total - record.read, get, now)
            except DamagedError as error:
                guest.damaged(error)
                continue
            # Of whom no event is known, there is no state.
            if unread.ids:
                guest.row = states.start() if guest.row is None else guest.row
                stepping.append((guest, unread))
        if not stepping:
            return
        whole = [len(unread.ids) - states.tried >= self._state_every for _, unread in stepping]
        rows = states.step([_row(guest) for guest, _ in stepping], [unread for _, unread in stepping], whole)
        for (guest, unread), row, one in zip(stepping, rows, whole):
            guest.row = row
            if one:
                guest.record.put_state(row, served.key, self._state_type, unread.behind)

    def _carried(self, served: Served, record: Record, state: bytes | None) -> np.ndarray | None:
        """The state that is stored, if it is whole, of this model, and has read all but events that are there."""
        size = 4 if record.state_type == STATE_TYPES["float32"] else 2
        state = record.state or state
        if record.digest != served.key or not state or len(state) != size * served.states.width:  # type: ignore[union-attr]
            return None
        if record.total - record.read > len(record.items) or checksum(state) != record.state_sum:
            return None
        return unpacked_state(state, record.state_type)

    def _rebuild(self, served: Served, guest: Guest, get: Get, now: float) -> Unread:
        """Compute a state again from all events that are kept, and say which they are."""
        assert served.states is not None
        try:
            guest.record.load_older(guest.visit.user, get)
            unread = self._unread(served, guest, len(guest.record.items), get, now)
        except DamagedError as error:
            guest.damaged(error)
            return Unread([])
        if unread.ids:
            guest.row, guest.changed = served.states.read(unread), True
            guest.record.put_state(guest.row, served.key, self._state_type, unread.behind)
        return unread

    def _unread(self, served: Served, guest: Guest, count: int, get: Get, now: float) -> Unread:
        """The newest so many events, those of known items; a model that reads times is asked at its moment.

        Raises:
            DamagedError: older events are needed and damaged.
        """
        assert served.states is not None
        record = guest.record
        if not served.recommender.reads_times:
            return Unread(self._ids(served, record, count))
        known = self._known(served, record)
        if not known or known[0][0] >= len(record.items) - count:
            # The gap before the first of them is counted from an older event.
            record.load_older(guest.visit.user, get)
            known = self._known(served, record)
        if not known:
            return Unread([])
        moments = moments_of([time for _, _, time in known], guest.visit.moment(now))
        guest.asked = moments[-1]
        first = len(record.items) - count
        unread = [(item, when) for (place, item, _), when in zip(known, moments) if place >= first]
        # Where the newest known event is only tried, a state lacks it and the unknown ones after it.
        behind = (len(record.items) - known[-1][0]) * served.states.tried
        return Unread([item for item, _ in unread], [when for _, when in unread], behind)

    def _known(self, served: Served, record: Record) -> list[tuple[int, int, int]]:
        """Place, item and time in seconds of each event that is there, of those of known items."""
        items = served.catalogue.places(record.items.texts(), "history", True)
        every = enumerate(zip(items, record.moments()))
        return [(place, item, math.floor(time)) for place, (item, time) in every if item is not None]

    def _ids(self, served: Served, record: Record, newest: int | None = None) -> Ids:
        """The items of the events that are there, or of so many of the newest."""
        items = record.items if newest is None else record.items.cut(len(record.items) - newest)[1]
        return served.catalogue.known(items.texts(), "history", skip_unknown=True)[0]

    def _writings(self, guest: Guest, now: float) -> Values:
        if guest.found.taken:
            guest.record.changed = now
        user = guest.visit.user
        found = guest.record.writings(user, self._state_history)
        if guest.is_damaged:
            # A head that is damaged does not say which other parts there are.
            found.update(dict.fromkeys(self.store.parts(user)))
        return found

    # --- answers ---

    def _answer(self, served: Served, guests: Sequence[Guest]) -> None:
        """Recommend to those who ask for it, and score what they want scored."""
        asking = [guest for guest in guests if guest.visit.k or guest.candidates is not None]
        at_once = max(1, MOST_SCORES // len(served.catalogue.items))
        for begin in range(0, len(asking), at_once):
            with torch.inference_mode():
                self._answer_some(served, asking[begin : begin + at_once])

    def _answer_some(self, served: Served, guests: Sequence[Guest]) -> None:
        known = []
        for guest in guests:
            ids = self._ids(served, guest.record) if guest.visit.exclude_seen or not served.states else []
            if guest.row is not None or (ids and not served.states):
                known.append((guest, ids))
            else:
                self._answer_a_stranger(served, guest)
        if served.nearest is not None:
            self._search(served, [(guest, ids) for guest, ids in known if guest.candidates is None])
            known = [(guest, ids) for guest, ids in known if guest.candidates is not None]
        if not known:
            return
        with self._timed("score"):
            if served.states is None:
                scores = self._scores(served, known)
            else:
                scores = served.states.scores([_row(guest) for guest, _ in known], [guest.asked for guest, _ in known])
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

    def _search(self, served: Served, known: Sequence[tuple[Guest, Ids]]) -> None:
        """Recommend from an index, to those who want no scores."""
        if not known:
            return
        assert served.nearest is not None and served.states is not None
        with self._timed("top_k"):
            found = served.nearest.best(
                served.states.queries([_row(guest) for guest, _ in known], [guest.asked for guest, _ in known]),
                max(guest.visit.k for guest, _ in known),
                [guest.refused for guest, _ in known],
                [ids if guest.visit.exclude_seen else [] for guest, ids in known],
            )
        for (guest, _), one in zip(known, found):
            named = [(served.catalogue.items[item], score) for item, score in one[: guest.visit.k]]
            guest.found.recommended = Recommendations(named)

    def _scores(self, served: Served, known: Sequence[tuple[Guest, Ids]]) -> Tensor:
        """The scores of a model that reads the events again."""
        ids = [ids for _, ids in known]
        if not served.recommender.reads_times:
            return served.recommender.scores(ids)
        times = [[time for _, _, time in self._known(served, guest.record)] for guest, _ in known]
        moments = [guest.visit.moment(time.time()) for guest, _ in known]
        return served.recommender.scores(ids, times, moments)

    def _answer_a_stranger(self, served: Served, guest: Guest) -> None:
        """Answer one of whom no event of a known item is known."""
        try:
            if guest.candidates is not None:
                raise UserError(f"user {guest.visit.user!r}: has no event of a known item, so nothing can be scored")
            guest.found.recommended = served.catalogue.popular(guest.visit.k, [], guest.refused)
        except UserError as error:
            guest.error = error

    # --- all users ---

    def tidy(self) -> Iterator[None]:
        """Go through all users once, some at a time: states of former models are computed again, and who had no event
        for ``forget_after`` is forgotten.
        """
        users = self.store.users()
        while piece := list(islice(users, LOOKED_AT_AT_ONCE)):
            keys = [user.encode() for user in piece]
            heads = self.store.read(lambda get, keys=keys: get(keys))  # type: ignore[misc]
            stale = [user for user, key in zip(piece, keys) if self._is_stale(heads[key])]
            for begin in range(0, len(stale), REBUILT_AT_ONCE):
                self.visit([Visit(user) for user in stale[begin : begin + REBUILT_AT_ONCE]])
                yield
            yield

    def _is_stale(self, value: bytes | None) -> bool:
        try:
            record = decoded(value) if value else None
        except (DamagedError, UserError):
            # Whoever asks for this user is told.
            return False
        if record is None:
            return False
        is_old = self._forget_after is not None and record.changed < time.time() - self._forget_after
        stateless = self.served.states is None or record.total < STATE_EVERY
        return is_old or (not stateless and record.digest != self.served.key)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        if part == "step":
            self._stepping += seconds
        self._observe(part, seconds)


def _row(guest: Guest) -> np.ndarray:
    """The state of a guest who has one."""
    assert guest.row is not None
    return guest.row
