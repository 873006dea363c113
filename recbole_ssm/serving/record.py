"""What is kept of a user, as bytes: the events, and the model's state after them.

A value is a header, the events in columns, the newest event ids, and the state. The header and the events have one
checksum and the state another, because a state that is damaged can be computed again from the events.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from recbole_ssm.errors import UserError

MAGIC = b"RSU1"
"""The first bytes of a value; the digit is the version of the format."""
LONGEST_ID = 500
"""Bytes that the id of a user, an item or an event may have in UTF-8; lmdb's keys have at most 511."""
EVENT_IDS = 64
"""So many ids of events are kept, the newest."""

_MARK = struct.Struct("<4sI")
# Checksum of the state, its model, its type, events ever taken, time of the last change; then how long each part is:
# events, bytes of their items, event ids, bytes of these, bytes of the state.
_HEADER = struct.Struct("<I16sBQdIIHII")
_TYPES = {0: torch.float32, 1: torch.bfloat16}
STATE_TYPES = {"float32": 0, "bf16": 1}


class DamagedError(ValueError):
    """A value whose events are not what was written; nothing can be computed from it."""


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
        items: the items of the newest events, oldest first.
        times: their times in seconds, eight bytes an event; they never fall.
        total: how many events were taken ever; beyond those that are kept, the state has read them nevertheless.
        changed: when the record was written last, in seconds since 1970.
        event_ids: the newest ids of events, oldest first.
        digest: the first 16 bytes of the digest of the model that the state is of; empty where there is no state.
        state: :func:`packed_state` of the state.
        state_type: what its numbers are, one of the values of :data:`STATE_TYPES`.
    """

    items: Texts = field(default_factory=Texts)
    times: bytes = b""
    total: int = 0
    changed: float = 0.0
    event_ids: list[str] = field(default_factory=list)
    digest: bytes = b""
    state: bytes = b""
    state_type: int = 0

    @property
    def newest(self) -> float:
        """The time of the newest event; minus infinity where there is none."""
        return struct.unpack_from("<d", self.times, len(self.times) - 8)[0] if self.times else -float("inf")

    def moments(self) -> list[float]:
        """The times of the events in seconds."""
        return np.frombuffer(self.times, "<f8").tolist()

    def append(self, item: str, time: float) -> None:
        """Take an event that is as new as the newest or newer."""
        self.items.append(item)
        self.times += struct.pack("<d", time)
        self.total += 1

    def insert(self, item: str, time: float) -> None:
        """Take an event behind all that are as old as it or older; the state does not fit the events any more."""
        place = int(np.searchsorted(np.frombuffer(self.times, "<f8"), time, side="right"))
        texts = self.items.texts()
        texts.insert(place, item)
        self.items = Texts.of(texts)
        self.times = self.times[: 8 * place] + struct.pack("<d", time) + self.times[8 * place :]
        self.total += 1
        self.digest = self.state = b""

    def keep(self, events: int) -> None:
        """Forget all but the newest events; the state stays, for it has read them."""
        if (surplus := len(self.items) - events) > 0:
            gone = sum(struct.unpack_from(f"<{surplus}H", self.items.lengths))
            self.items = Texts(self.items.lengths[2 * surplus :], self.items.content[gone:])
            self.times = self.times[8 * surplus :]

    def encoded(self) -> bytes:
        """The record as bytes, which :func:`decoded` reads."""
        ids = Texts.of(self.event_ids[-EVENT_IDS:])
        header = _HEADER.pack(
            zlib.crc32(self.state),
            self.digest,
            self.state_type,
            self.total,
            self.changed,
            len(self.items),
            len(self.items.content),
            len(ids),
            len(ids.content),
            len(self.state),
        )
        body = b"".join([header, self.times, self.items.lengths, self.items.content, ids.lengths, ids.content])
        return b"".join([_MARK.pack(MAGIC, zlib.crc32(body)), body, self.state])


def decoded(value: bytes) -> Record:
    """The record that bytes stand for. A state that is damaged is left out, so that it is computed again.

    Raises:
        DamagedError: the events are damaged, or the bytes are no record.
        UserError: another version of this package wrote them.
    """
    if len(value) < _MARK.size + _HEADER.size:
        raise DamagedError("it is cut short")
    magic, checksum = _MARK.unpack_from(value)
    if magic != MAGIC and magic[:3] == MAGIC[:3]:
        raise UserError(f"state: another version of recbole_ssm wrote this record (format {magic[3:]!r}); use that one")
    state_sum, digest, kind, total, changed, events, text, ids, id_text, state = _HEADER.unpack_from(value, _MARK.size)
    bounds = [_MARK.size + _HEADER.size]
    for size in (8 * events, 2 * events, text, 2 * ids, id_text, state):
        bounds.append(bounds[-1] + size)
    body = memoryview(value)[_MARK.size : bounds[5]]
    if magic != MAGIC or bounds[6] != len(value) or zlib.crc32(body) != checksum or kind not in _TYPES:
        raise DamagedError("its content is not what was written")
    parts = [value[begin:end] for begin, end in pairwise(bounds)]
    whole = zlib.crc32(parts[5]) == state_sum
    return Record(
        items=Texts(parts[1], parts[2]),
        times=parts[0],
        total=total,
        changed=changed,
        event_ids=Texts(parts[3], parts[4]).texts(),
        digest=digest if whole and state else b"",
        state=parts[5] if whole else b"",
        state_type=kind,
    )


def digest_and_change(value: bytes) -> tuple[bytes, float]:
    """The digest and the time of the last change in bytes of a record, which are not looked at any further.

    Raises:
        DamagedError: there are too few of them.
    """
    if len(value) < _MARK.size + _HEADER.size:
        raise DamagedError("it is cut short")
    _, digest, _, _, changed, *_ = _HEADER.unpack_from(value, _MARK.size)
    return digest, changed


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
