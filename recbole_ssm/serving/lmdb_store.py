"""The records of users in a folder, by lmdb, which several servers on one machine may share."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from recbole_ssm.errors import UserError, require
from recbole_ssm.serving.record import PART, Get
from recbole_ssm.serving.store import AT_ONCE, Change, StoreError

T = TypeVar("T")
SYNC_WITHIN = 0.01
"""Seconds after an update at which what is batched begins to be synced."""
UNWRITTEN = 1 << 16
"""Bytes by which lmdb's file may be shorter than its pages: the last may have been freed before they were written."""
LEAST_ROOM = 1 << 20
"""A disk with fewer bytes free is full: a change may need as many."""
PARTS = PART + b"parts"
"""The name of lmdb's tree of states and older events; no user has it, since it is no UTF-8."""


class LmdbStore:
    """Values in a folder, by lmdb: a memory-mapped tree that a kill at any moment leaves whole.

    A process opens a folder once; several processes may have it open, on one machine.
    """

    def __init__(self, folder: Path, durability: str, most_bytes: int, create: bool = True) -> None:
        self._lmdb = require("lmdb", "state: a folder needs lmdb; pip install 'recbole-ssm[serve]'")
        self._folder, self._place = folder, f"state {folder}"
        file = folder / "data.mdb"
        if not create and not file.is_file():
            raise UserError(f"{self._place}: holds no store; name the folder that a server or an import has filled")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._env = self._lmdb.open(
                str(folder), map_size=most_bytes, sync=durability == "each", max_readers=512, max_dbs=1
            )
            # States and older events lie in a tree of their own: the tree of heads stays small, and counts the users.
            self._parts = self._env.open_db(PARTS)
            # A process that was killed while it read would keep old pages from reuse.
            self._env.reader_check()
        except (OSError, self._lmdb.Error) as error:
            raise UserError(f"{self._place}: cannot be opened ({error}); name another folder, or restore it") from error
        self._check_length(file)
        self._dirty, self._open, self._failed = threading.Event(), True, ""
        self._lock = threading.RLock()
        self._syncer = threading.Thread(target=self._sync_later, daemon=True) if durability == "batched" else None
        if self._syncer:
            self._syncer.start()

    def _check_length(self, file: Path) -> None:
        """See to it that the file is as long as its pages are; reading behind its end would end the process."""
        # As long as this transaction writes, no other process does, and makes it longer.
        with self._env.begin(write=True):
            needed = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
            missing = needed - file.stat().st_size
            if missing > UNWRITTEN:
                line = f"{self._place}: data.mdb is {missing:,} bytes short; restore it, or name another folder"
                raise UserError(line)
            if missing > 0:
                os.truncate(file, needed)

    def _tree(self, key: bytes) -> Any:
        return self._parts if PART in key else None

    def _getting(self, transaction: Any) -> Get:
        return lambda keys: {key: transaction.get(key, db=self._tree(key)) for key in keys}

    @contextmanager
    def _transaction(self, write: bool = False) -> Iterator[Any]:
        """A transaction of lmdb, whose errors are raised as those of a store."""
        # One at a time: a larger map may lie elsewhere, where another transaction would not look for it.
        with self._telling(write), self._lock:
            try:
                begun = self._env.begin(write=write)
            except self._lmdb.MapResizedError:
                # Another process may fill the folder further than this one; from now on this one may too.
                self._env.set_mapsize(0)
                begun = self._env.begin(write=write)
            with begun as transaction:
                yield transaction

    def read(self, work: Callable[[Get], T]) -> T:
        """As of :class:`Store`."""
        with self._transaction() as transaction:
            return work(self._getting(transaction))

    def update(self, change: Change) -> None:
        """As of :class:`Store`."""
        with self._transaction(write=True) as transaction:
            if self._failed:
                raise StoreError(errno.EIO, f"{self._place}: failed ({self._failed})")
            for key, value in change(self._getting(transaction)).items():
                if value is None:
                    transaction.delete(key, db=self._tree(key))
                else:
                    transaction.put(key, value, db=self._tree(key))
        self._dirty.set()

    def parts(self, user: str) -> list[bytes]:
        """As of :class:`Store`."""
        begin = user.encode() + PART
        with self._transaction() as transaction, transaction.cursor(self._parts) as cursor:
            if not cursor.set_range(begin):
                return []
            return list(itertools.takewhile(lambda key: key.startswith(begin), cursor.iternext(values=False)))

    def _sync_later(self) -> None:
        while self._open:
            self._dirty.wait()
            time.sleep(SYNC_WITHIN / 2)
            self._dirty.clear()
            try:
                self.sync()
            except self._lmdb.Error as error:
                # What was acknowledged may be lost when the machine ends, so nothing more is acknowledged.
                self._failed = f"what was written could not be synced: {error}"

    def users(self) -> Iterator[str]:
        """As of :class:`Store`; read in pieces, because a transaction that stays open keeps old pages from reuse."""
        piece = self._piece(b"")
        while piece:
            yield from (key.decode() for key in piece)
            piece = self._piece(piece[-1])

    def _piece(self, after: bytes) -> list[bytes]:
        """The next keys behind one."""
        with self._transaction() as transaction, transaction.cursor() as cursor:
            if not (cursor.set_range(after) if after else cursor.first()):
                return []
            keys = itertools.islice(cursor.iternext(values=False), AT_ONCE)
            return [key for key in keys if key not in (after, PARTS)]

    @contextmanager
    def _telling(self, writing: bool = False) -> Iterator[None]:
        """Raise lmdb's errors as those of a store."""
        try:
            yield
        except self._lmdb.Error as error:
            raise self._failure(error, writing) from error

    def _failure(self, error: Exception, writing: bool) -> StoreError:
        number, what = errno.EIO, f"failed ({error})"
        if isinstance(error, self._lmdb.MapFullError):
            number, what = errno.ENOSPC, "is full; delete users or raise --state_bytes"
        elif isinstance(error, self._lmdb.DiskError) or (writing and self._is_disk_full()):
            number, what = errno.ENOSPC, f"the disk is full ({error}); make room there"
        return StoreError(number, f"{self._place}: {what}")

    def _is_disk_full(self) -> bool:
        """Whether there is no room for a change: lmdb calls a write that is cut short an input/output error."""
        try:
            return shutil.disk_usage(self._folder).free < LEAST_ROOM
        except OSError:
            return False

    def sync(self) -> None:
        """As of :class:`Store`."""
        self._env.sync(True)

    def close(self) -> None:
        """As of :class:`Store`."""
        self._open = False
        self._dirty.set()
        if self._syncer:
            self._syncer.join()
        self.sync()
        self._env.close()

    def __len__(self) -> int:
        # The name of the other tree is no user.
        with self._transaction() as transaction:
            return int(transaction.stat()["entries"]) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all pages in use."""
        with self._transaction() as transaction:
            trees = [transaction.stat(tree) for tree in (None, self._parts)]
        return sum(
            (about["branch_pages"] + about["leaf_pages"] + about["overflow_pages"]) * about["psize"] for about in trees
        )
