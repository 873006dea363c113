"""The records of users on a Redis server, which several servers on several machines may share."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import getLogger
from typing import Any, TypeVar

from recbole_ssm.errors import UserError, require
from recbole_ssm.serving.record import PART, Get, Values
from recbole_ssm.serving.store import AT_ONCE, Change, StoreError

T = TypeVar("T")
KNOWN_FOR = 3600
"""Seconds for which a Redis server knows the last update of a store; it is asked within one call."""
CAUSED = " caused error: "
"""In an error of redis-py's, what stands between the command and what the server says."""
FULL = "command not allowed when used memory"
"""The server says so where its memory is full."""


class RedisStore:
    """Values on a Redis server. How durable a write is it decides, by its own ``appendfsync``."""

    PREFIX, PARTS = b"recbole_ssm:user:", b"recbole_ssm:part:"
    WRITTEN = b"recbole_ssm:written:"
    """Before the name of a store, the key of its last update that was written."""
    COUNT = b"recbole_ssm:users"
    """The key of how many users there are; to count them, Redis must go through all of its keys."""

    def __init__(self, address: str) -> None:
        self._written = self.WRITTEN + os.urandom(8).hex().encode()
        # By how many the count of users is too high, because a full server took deletions alone.
        self._owed = 0
        self._redis = require("redis", "state: redis:// needs the package redis; pip install redis")
        try:
            self._client = self._redis.Redis.from_url(address, socket_timeout=5.0, socket_connect_timeout=5.0)
            if not self._client.exists(self.COUNT):
                # It is a new store, or one of a former version.
                self._client.set(self.COUNT, sum(1 for _ in self.users()), nx=True)
        except (ValueError, StoreError, self._redis.RedisError) as error:
            full = FULL in str(error)
            fault = "the server is full; raise its maxmemory" if full else f"no Redis server answers ({error})"
            raise UserError(f"state {address.rpartition('@')[2]}: {fault}") from error

    def _name(self, key: bytes) -> bytes:
        return (self.PARTS if PART in key else self.PREFIX) + key

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Raise errors of Redis as those of a store."""
        try:
            yield
        except self._redis.RedisError as error:
            # Before what the server says, redis-py puts the command, with values of whoever shares the transaction.
            command, _, told = str(error).rpartition(CAUSED)
            if command:
                getLogger().error(f"state: {error}")
            if FULL in told:
                line = f"state: the Redis server is full ({told}); delete users or raise its maxmemory"
                raise StoreError(errno.ENOSPC, line) from error
            raise StoreError(errno.EIO, f"state: the Redis server failed ({told})") from error

    def _transact(self, work: Callable[[Get], T], write: Callable[[Any, T, Values], None]) -> T:
        """Read and write; where another server wrote meanwhile what was read, once more.

        Where the connection is lost before the answer comes, redis-py cannot know whether it was written, and calls
        once more too. So an update writes its own number with the rest, and looks for it before it does anything twice.
        """
        made: list[T] = []
        found: Values = {}
        number = os.urandom(16)

        def once(pipe: Any) -> None:
            if made:
                pipe.watch(self._written)
                if pipe.get(self._written) == number:
                    return

            def get(keys: Sequence[bytes]) -> Values:
                if not keys:
                    return {}
                names = [self._name(key) for key in keys]
                pipe.watch(*names)
                values = dict(zip(keys, pipe.mget(names)))
                found.update(values)
                return values

            found.clear()
            made[:] = [work(get)]
            pipe.multi()
            write(pipe, made[0], found)
            if pipe.command_stack:
                pipe.set(self._written, number, ex=KNOWN_FOR)

        with self._telling():
            self._client.transaction(once)
        return made[0]

    def read(self, work: Callable[[Get], T]) -> T:
        """As of :class:`Store`."""
        return self._transact(work, lambda pipe, made, found: None)

    def update(self, change: Change) -> None:
        """As of :class:`Store`."""

        def write(pipe: Any, changed: Mapping[bytes, bytes | None], found: Values) -> None:
            come = -self._owed
            for key, value in changed.items():
                if PART not in key:
                    come += (value is not None) - (found.get(key) is not None)
                if value is None:
                    pipe.delete(self._name(key))
                else:
                    pipe.set(self._name(key), value)
            if come:
                pipe.incrby(self.COUNT, come)

        try:
            self._transact(change, write)
            self._owed = 0
        except StoreError as error:
            if not error.full or not self._deleted(change):
                raise

    def _deleted(self, change: Change) -> bool:
        """Whether a change does nothing but delete, and has been carried out on a server that is full.

        Such a server refuses every command of a transaction. By itself one that deletes is carried out, and nobody can
        have written meanwhile.
        """
        found: Values = {}

        def read(get: Get) -> Mapping[bytes, bytes | None]:
            def noted(keys: Sequence[bytes]) -> Values:
                values = get(keys)
                found.update(values)
                return values

            return change(noted)

        changed = self.read(read)
        if any(value is not None for value in changed.values()):
            return False
        if changed:
            with self._telling():
                self._client.delete(*map(self._name, changed))
        self._owed += sum(found.get(key) is not None for key in changed if PART not in key)
        return True

    def parts(self, user: str) -> list[bytes]:
        """As of :class:`Store`."""
        begin = self.PARTS + user.encode() + PART
        names = self._scan(self.PARTS)
        return [name[len(self.PARTS) :] for name in names if name.startswith(begin)]

    def users(self) -> Iterator[str]:
        """As of :class:`Store`."""
        return (name[len(self.PREFIX) :].decode() for name in self._scan(self.PREFIX))

    def _scan(self, prefix: bytes) -> Iterator[bytes]:
        given = set()
        with self._telling():
            for name in self._client.scan_iter(match=prefix + b"*", count=AT_ONCE):
                # SCAN may give a name several times.
                if name not in given:
                    given.add(name)
                    yield name

    def sync(self) -> None:
        """The Redis server does that."""

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __len__(self) -> int:
        with self._telling():
            return int(self._client.get(self.COUNT) or 0) - self._owed

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the whole Redis server."""
        with self._telling():
            return int(self._client.info("memory")["used_memory"])
