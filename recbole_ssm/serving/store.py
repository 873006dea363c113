"""What a store of the records of users is, and the one that lies in memory.

A store is a small interface: values by key. The key of a user's head is the name in UTF-8; those of the other
parts of a user have :data:`~recbole_ssm.serving.record.PART` and more behind it. Only :meth:`Store.update` writes: what
it reads and what it writes are one transaction, so that several servers may share a store.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from recbole_ssm.serving.record import PART, Get, Values

T = TypeVar("T")
Change = Callable[[Get], Mapping[bytes, bytes | None]]
"""Reads what it needs, every head that it writes among it, and says what is to be written; it may be called again, when
newer values are there."""

AT_ONCE = 256
"""The names of so many users are read at once."""


class StoreError(OSError):
    """The store took nothing of a change, or cannot be read: the disk is full or damaged, or the server is gone.

    A Redis server that goes before it answers may have taken the change.
    """

    @property
    def full(self) -> bool:
        """Whether there is no room left."""
        return self.errno == errno.ENOSPC


class Store(Protocol):
    """Values by key."""

    def read(self, work: Callable[[Get], T]) -> T:
        """What a function makes of values that were there at one moment.

        Raises:
            StoreError: they cannot be read.
        """

    def update(self, change: Change) -> None:
        """Let a change read values, and write what it says, all or nothing.

        Raises:
            StoreError: nothing was written.
        """

    def parts(self, user: str) -> list[bytes]:
        """The keys of all parts of a user but the head; for a user whose head does not say them."""

    def users(self) -> Iterator[str]:
        """Every user, in an order of the store's; who comes or goes meanwhile may be among them or not.

        Raises:
            StoreError: they cannot be read.
        """

    def sync(self) -> None:
        """See to it that all that was written outlives a crash of the machine."""

    def close(self) -> None:
        """Sync, and let go of everything."""

    def __len__(self) -> int:
        """How many users there are.

        Raises:
            StoreError: they cannot be counted.
        """

    @property
    def nbytes(self) -> int:
        """Bytes that the values take where they lie.

        Raises:
            StoreError: they cannot be counted.
        """


class MemoryStore:
    """Values in this process, which end with it."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def _get(self, keys: Sequence[bytes]) -> Values:
        return {key: self._values.get(key) for key in keys}

    def read(self, work: Callable[[Get], T]) -> T:
        """As of :class:`Store`."""
        with self._lock:
            return work(self._get)

    def update(self, change: Change) -> None:
        """As of :class:`Store`."""
        with self._lock:
            for key, value in change(self._get).items():
                if value is None:
                    self._values.pop(key, None)
                else:
                    self._values[key] = value

    def parts(self, user: str) -> list[bytes]:
        """As of :class:`Store`."""
        return [key for key in list(self._values) if key.startswith(user.encode() + PART)]

    def users(self) -> Iterator[str]:
        """As of :class:`Store`."""
        with self._lock:
            return iter([key.decode() for key in self._values if PART not in key])

    def sync(self) -> None:
        """There is no disk."""

    def close(self) -> None:
        """Let go of the values."""
        self._values.clear()

    def __len__(self) -> int:
        return sum(1 for _ in self.users())

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        with self._lock:
            return sum(map(len, self._values.values()))
