"""What is kept of a user, as bytes: the events, and now and then the model's state after them.

A user has a few values. The head holds the newest events, the newest event ids, and what is to be known of the others;
it is small, and written with every event. Older events are sealed in chunks, which are written once. The state is
written every :data:`STATE_EVERY` events, since what it has not read yet is in the head. Every value has a checksum.
That of the state is in the head: a state that is damaged, or not the one that the head means, is computed again.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from recbole_ssm.errors import UserError

Values = dict[bytes, bytes | None]
"""The value of each key; None where there is none, or shall be none."""
Get = Callable[[Sequence[bytes]], Values]
"""Reads the values of some keys."""

MAGIC, FORMER = b"RSU2", b"RSU1"
"""The first bytes of a head; the digit is the version of the format. The former was one value with events and state."""
LONGEST_ID = 500
"""Bytes that the id of a user, an item or an event may have in UTF-8; lmdb's keys have at most 511."""
EVENT_IDS = 64
"""The newest so many ids of events are kept, and more where one call brings more."""
CHUNK = 32
"""Events of a chunk. A head holds twice as many at most."""
STATE_EVERY = 8
"""A state is written as soon as the one in the store lacks so many events. They are all in the head: once a user has
chunks, the head never holds fewer than :data:`CHUNK` events."""

_MARK = struct.Struct("<4sI")
# Checksum of the state, its model, its type, events that it has read, events ever taken, when the last were taken, the
# first chunk and that behind the last; then how long each part is: events, bytes of their items, event ids, bytes of
# these.
_HEADER = struct.Struct("<I16sBQQdIIIIHI")
# Checksum of the state, its model, its type, events ever taken, when the last were taken; then how long each part is:
# events, bytes of their items, event ids, bytes of these, bytes of the state.
_FORMER_HEADER = struct.Struct("<I16sBQdIIHII")
_CHUNK = struct.Struct("<II")
_TYPES = {0: torch.float32, 1: torch.bfloat16}
STATE_TYPES = {"float32": 0, "bf16": 1}


class DamagedError(ValueError):
    """A value whose events are not what was written; nothing can be computed from it."""


# No text in UTF-8 holds this byte, so no user's name does.
PART = b"\xff"
"""What is behind a user's name in the key of a state or a chunk begins with this."""


def state_key(user: str) -> bytes:
    """Where a user's state lies."""
    return user.encode() + PART + b"s"


def chunk_key(user: str, number: int) -> bytes:
    """Where older events of a user lie."""
    return user.encode() + PART + b"c" + struct.pack(">I", number)


@dataclass(slots=True)
class Texts:
    """A list of texts that grows at its end, as bytes."""

    lengths: bytes = b""
    """The length of each, two bytes a text."""
    content: bytes = b""
    """All of them in UTF-8, one after the other."""

    @classmethod
    def of(cls, texts: list[str]) -> Texts:
        """A list of these texts."""
        encoded = [text.encode() for text in texts]
        return cls(struct.pack(f"<{len(encoded)}H", *map(len, encoded)), b"".join(encoded))

    def __len__(self) -> int:
        return len(self.lengths) // 2

    def append(self, text: str) -> None:
        """Add a text of at most 65,535 bytes."""
        encoded = text.encode()
        self.lengths += struct.pack("<H", len(encoded))
        self.content += encoded

    def cut(self, count: int) -> tuple[Texts, Texts]:
        """The first so many texts, and those behind them."""
        size = sum(struct.unpack_from(f"<{count}H", self.lengths))
        before = Texts(self.lengths[: 2 * count], self.content[:size])
        return before, Texts(self.lengths[2 * count :], self.content[size:])

    def texts(self) -> list[str]:
        """All of them, in their order."""
        found, begin = [], 0
        for (length,) in struct.iter_unpack("<H", self.lengths):
            found.append(self.content[begin : begin + length].decode())
            begin += length
        return found


@dataclass(slots=True)
class Record:
    """One user.

    Attributes:
        items: the items of the newest events, oldest first: those of the head, and behind :meth:`load_older` all.
        times: their times in seconds, eight bytes an event; they never fall.
        total: how many events were taken ever; beyond those that are kept, the state has read them nevertheless.
        changed: when events were taken last, in seconds since 1970.
        event_ids: the newest ids of events, oldest first.
        first: the number of the first chunk.
        sealed: the number behind that of the last chunk.
        older: how many of ``items`` are those of chunks.
        gone: numbers of chunks that the next writing deletes.
        digest: the first 16 bytes of the digest of the model that the state is of; empty where there is no state.
        read: how many of all events the state has read.
        state_sum: its checksum.
        state_type: what its numbers are, one of the values of :data:`STATE_TYPES`.
        state: :func:`packed_state` of a state that the next writing writes.
    """

    items: Texts = field(default_factory=Texts)
    times: bytes = b""
    total: int = 0
    changed: float = 0.0
    event_ids: list[str] = field(default_factory=list)
    first: int = 0
    sealed: int = 0
    older: int = 0
    gone: Sequence[int] = ()
    digest: bytes = b""
    read: int = 0
    state_sum: int = 0
    state_type: int = 0
    state: bytes = b""

    @property
    def newest(self) -> float:
        """The time of the newest event; minus infinity where there is none."""
        return struct.unpack_from("<d", self.times, len(self.times) - 8)[0] if self.times else -float("inf")

    @property
    def oldest(self) -> float:
        """The time of the oldest event that is here; infinity where there is none."""
        return struct.unpack_from("<d", self.times)[0] if self.times else float("inf")

    def moments(self) -> list[float]:
        """The times of the events in seconds."""
        return np.frombuffer(self.times, "<f8").tolist()

    def append(self, item: str, time: float) -> None:
        """Take an event that is as new as the newest or newer."""
        self.items.append(item)
        self.times += struct.pack("<d", time)
        self.total += 1

    def add(self, items: Sequence[str], times: Sequence[float]) -> None:
        """Take events, each behind all that are as old as it or older.

        Where one belongs before the events of the head, those of the chunks are loaded, and all chunks are written
        again. A state that has read what is behind the first of them, or that waits for the event there, is given up.
        """
        if all(before <= after for before, after in pairwise([self.newest, *times])):
            for item, time in zip(items, times):
                self.append(item, time)
            return
        known = np.frombuffer(self.times, "<f8")
        place = int(np.searchsorted(known, min(times), side="right"))
        before, behind = self.items.cut(place)
        texts, moments = [*behind.texts(), *items], np.concatenate([known[place:], times])
        order = np.argsort(moments, kind="stable")
        after = Texts.of([texts[number] for number in order])
        self.items = Texts(before.lengths + after.lengths, before.content + after.content)
        self.times = self.times[: 8 * place] + moments[order].astype("<f8").tobytes()
        if place < self.older:
            self._give_up_chunks()
        elif place < len(known) and self.total - len(known) + place <= self.read:
            self._give_up_state()
        self.total += len(items)

    def clear(self) -> None:
        """Forget all events."""
        self.items, self.times, self.total, self.event_ids = Texts(), b"", 0, []
        self._give_up_chunks()

    def _give_up_chunks(self) -> None:
        self.gone = [*self.gone, *range(self.first, self.sealed)]
        self.first, self.older = self.sealed, 0
        self._give_up_state()

    def _give_up_state(self) -> None:
        self.digest, self.read, self.state = b"", 0, b""

    def load_older(self, user: str, get: Get) -> None:
        """Put the events of the chunks before those of the head.

        Raises:
            DamagedError: a chunk is damaged or missing.
        """
        if self.older or self.first == self.sealed:
            return
        chunks = get([chunk_key(user, number) for number in range(self.first, self.sealed)])
        parts = [_opened(chunk) for chunk in chunks.values()]
        self.older = CHUNK * len(parts)
        everything = [*(part for part, _ in parts), self.items]
        self.items = Texts(b"".join(t.lengths for t in everything), b"".join(t.content for t in everything))
        self.times = b"".join([*(times for _, times in parts), self.times])

    def keep(self, events: int) -> None:
        """Forget all but the newest events; the state stays, for it has read them."""
        if (surplus := len(self.items) - events) > 0:
            self.items = self.items.cut(surplus)[1]
            self.times = self.times[8 * surplus :]
            self.older = max(0, self.older - surplus)

    def put_state(self, row: np.ndarray, digest: bytes, state_type: int, behind: int = 0) -> None:
        """Let the next writing write a state that has read every event but so many of the newest."""
        self.state, self.digest, self.state_type = packed_state(row, state_type), digest, state_type
        self.state_sum, self.read = checksum(self.state), self.total - behind

    def writings(self, user: str, events: int) -> Values:
        """What is to be written, by key, so that the newest so many events are kept, and no whole chunk more."""
        self.keep(events)
        found: Values = {chunk_key(user, number): None for number in self.gone}
        if not self.total:
            return {**found, user.encode(): None, state_key(user): None}
        items, times = self.items.cut(self.older)[1], self.times[8 * self.older :]
        while len(items) >= 2 * CHUNK:
            part, items = items.cut(CHUNK)
            body = part.lengths + part.content + times[: 8 * CHUNK]
            found[chunk_key(user, self.sealed)] = _CHUNK.pack(zlib.crc32(body), len(part.content)) + body
            self.sealed, times = self.sealed + 1, times[8 * CHUNK :]
        while self.sealed > self.first and CHUNK * (self.sealed - self.first - 1) + len(items) >= events:
            found[chunk_key(user, self.first)] = None
            self.first += 1
        if self.state:
            found[state_key(user)] = self.state
        elif not self.digest:
            found[state_key(user)] = None
        found[user.encode()] = self._head(items, times)
        return found

    def _head(self, items: Texts, times: bytes) -> bytes:
        ids = Texts.of(self.event_ids)
        header = _HEADER.pack(
            self.state_sum,
            self.digest,
            self.state_type,
            self.read,
            self.total,
            self.changed,
            self.first,
            self.sealed,
            len(items),
            len(items.content),
            len(ids),
            len(ids.content),
        )
        body = b"".join([header, times, items.lengths, items.content, ids.lengths, ids.content])
        return _MARK.pack(MAGIC, zlib.crc32(body)) + body


def _opened(chunk: bytes | None) -> tuple[Texts, bytes]:
    """The items and times of a chunk."""
    if chunk is None or len(chunk) < _CHUNK.size:
        raise DamagedError("older events are missing")
    total, size = _CHUNK.unpack_from(chunk)
    body = chunk[_CHUNK.size :]
    if len(body) != 10 * CHUNK + size or zlib.crc32(body) != total:
        raise DamagedError("older events are not what was written")
    return Texts(body[: 2 * CHUNK], body[2 * CHUNK : 2 * CHUNK + size]), body[2 * CHUNK + size :]


def decoded(value: bytes) -> Record:
    """The record that a head stands for, with the events that it holds.

    Raises:
        DamagedError: the events are damaged, or the bytes are no head.
        UserError: another version of this package wrote them.
    """
    magic, total = _MARK.unpack_from(value) if len(value) >= _MARK.size else (b"", 0)
    if magic == FORMER:
        return _former(value, total)
    if magic != MAGIC and magic[:3] == MAGIC[:3]:
        raise UserError(f"state: another version of recbole_ssm wrote this record (format {magic[3:]!r}); use that one")
    if len(value) < _MARK.size + _HEADER.size:
        raise DamagedError("it is cut short")
    about = _HEADER.unpack_from(value, _MARK.size)
    state_sum, digest, kind, read, events_ever, changed, first, sealed, events, text, ids, id_text = about
    parts = _split(value, _HEADER.size, (8 * events, 2 * events, text, 2 * ids, id_text))
    if magic != MAGIC or parts is None or zlib.crc32(value[_MARK.size :]) != total or kind not in _TYPES:
        raise DamagedError("its content is not what was written")
    return Record(
        items=Texts(parts[1], parts[2]),
        times=parts[0],
        total=events_ever,
        changed=changed,
        event_ids=Texts(parts[3], parts[4]).texts(),
        first=first,
        sealed=sealed,
        digest=digest if any(digest) else b"",
        read=read,
        state_sum=state_sum,
        state_type=kind,
    )


def _split(value: bytes, header: int, sizes: Sequence[int]) -> list[bytes] | None:
    """The parts behind a header; None where they are not as long as the value."""
    bounds = [_MARK.size + header]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return [value[begin:end] for begin, end in pairwise(bounds)] if bounds[-1] == len(value) else None


def whole_record(user: str, get: Get) -> Record | None:
    """A user's record with all events that are kept; None where there is no such user.

    Raises:
        DamagedError: it is damaged.
        UserError: another version of this package wrote it.
    """
    value = get([user.encode()])[user.encode()]
    if value is None:
        return None
    found = decoded(value)
    found.load_older(user, get)
    return found


def _former(value: bytes, total: int) -> Record:
    """A record of the former format, which held everything; a state that is damaged is left out."""
    if len(value) < _MARK.size + _FORMER_HEADER.size:
        raise DamagedError("it is cut short")
    about = _FORMER_HEADER.unpack_from(value, _MARK.size)
    state_sum, digest, kind, events_ever, changed, events, text, ids, id_text, state = about
    parts = _split(value, _FORMER_HEADER.size, (8 * events, 2 * events, text, 2 * ids, id_text, state))
    body = memoryview(value)[_MARK.size : len(value) - state]
    if parts is None or zlib.crc32(body) != total or kind not in _TYPES:
        raise DamagedError("its content is not what was written")
    found = Record(Texts(parts[1], parts[2]), parts[0], events_ever, changed, Texts(parts[3], parts[4]).texts())
    found.digest = digest if any(digest) else b""
    if state and zlib.crc32(parts[5]) == state_sum:
        found.state_type, found.read, found.state = kind, events_ever, parts[5]
        found.state_sum = checksum(found.state)
    return found


def checksum(state: bytes) -> int:
    """The checksum of a state."""
    return zlib.crc32(state)


def packed_state(row: np.ndarray, state_type: int) -> bytes:
    """Numbers of float32 as bytes of the type; bf16 takes half and keeps three digits."""
    if _TYPES[state_type] == torch.float32:
        return row.tobytes()
    return torch.from_numpy(row).to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def unpacked_state(state: bytes, state_type: int) -> np.ndarray:
    """The inverse of :func:`packed_state`, in float32."""
    if _TYPES[state_type] == torch.float32:
        return np.frombuffer(state, np.float32)
    # The upper half of a float32 is a bf16.
    return (np.frombuffer(state, "<u2").astype(np.uint32) << 16).view(np.float32)
