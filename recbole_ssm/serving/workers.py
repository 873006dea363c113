"""Several processes that answer on one port: forked from one that has loaded the model, so that they share its memory.

Each has an event loop, an engine and a connection to the store of its own; a store's transactions keep the records of
users right, whoever writes them.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from logging import getLogger
from pathlib import Path

from recbole_ssm.errors import UserError, first_line

# A system without SIGHUP has no fork either, but this module can be imported there.
PASSED_ON = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM))
SOON, TOO_OFTEN = 5.0, 3
"""A server ends where so many workers in a row end within so many seconds of their start."""
AGREE_WITHIN = 60.0
"""Seconds in which every worker must have loaded a model that one of them was told to serve."""


class Team:
    """What the workers of a server know of each other, in memory that they share: the model that was chosen last, and
    which one each of them serves.

    Args:
        count: how many workers there are.
    """

    _CHOSEN = struct.Struct("<H4094s")
    _MEMBER = struct.Struct("<q32s")

    def __init__(self, count: int) -> None:
        self._count = count
        self._memory = mmap.mmap(-1, self._CHOSEN.size + count * self._MEMBER.size)

    @property
    def chosen(self) -> Path | None:
        """The place of the model that was chosen last; None as long as none was."""
        length, name = self._CHOSEN.unpack_from(self._memory)
        return Path(os.fsdecode(name[:length])) if length else None

    def note(self, number: int, digest: str) -> None:
        """A worker that can be told of a choice says which model it serves."""
        self._put(number, os.getpid(), bytes.fromhex(digest))

    def remove(self, number: int) -> None:
        """A worker has ended."""
        self._put(number, 0, b"")

    async def choose(self, place: Path) -> None:
        """Let all other workers serve a model that this one serves already, and wait until they do.

        Raises:
            TimeoutError: one of them does not.
        """
        name = os.fsencode(place)
        self._CHOSEN.pack_into(self._memory, 0, len(name), name)
        for pid, _ in self._members():
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
        until = time.monotonic() + AGREE_WITHIN
        while len({digest for _, digest in self._members()}) > 1:
            if time.monotonic() > until:
                raise TimeoutError
            await asyncio.sleep(0.01)

    def _put(self, number: int, pid: int, digest: bytes) -> None:
        self._MEMBER.pack_into(self._memory, self._CHOSEN.size + number * self._MEMBER.size, pid, digest)

    def _members(self) -> list[tuple[int, bytes]]:
        """Process and digest of each worker that runs."""
        places = range(self._CHOSEN.size, self._CHOSEN.size + self._count * self._MEMBER.size, self._MEMBER.size)
        return [member for member in (self._MEMBER.unpack_from(self._memory, place) for place in places) if member[0]]


def supervise(work: Callable[[int], None], team: Team, count: int) -> None:
    """Keep forked processes at work until SIGTERM or SIGINT; another takes the place of one that ends before.

    SIGTERM and SIGINT reach the workers as SIGTERM, and SIGHUP as it is.

    Args:
        work: what worker ``number`` does.
        team: what the workers share; who ends is taken out of it.
        count: of workers.

    Raises:
        UserError: workers end as soon as they begin.
    """
    workers: dict[int, tuple[int, float]] = {}
    stopping = False
    # It ends when this process does, however that is.
    alive, held = os.pipe()

    def pass_on(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = stopping or number != signal.SIGHUP
        for pid in list(workers):
            os.kill(pid, number if number == signal.SIGHUP else signal.SIGTERM)

    def begin(number: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        if not stopping:
            pid = os.fork()
            if pid == 0:
                os.close(held)
                _work(work, number, alive)
            workers[pid] = number, time.monotonic()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)

    for one in PASSED_ON:
        signal.signal(one, pass_on)
    for number in range(count):
        begin(number)
    failures = 0
    while workers:
        pid, status = os.waitpid(-1, 0)
        number, since = workers.pop(pid)
        team.remove(number)
        if stopping:
            continue
        failures = failures + 1 if time.monotonic() - since < SOON else 0
        if failures == TOO_OFTEN:
            pass_on(signal.SIGTERM, None)
            continue
        getLogger().error(f"worker {number} ended ({_reason(status)}); another takes its place")
        begin(number)
    if failures == TOO_OFTEN:
        raise UserError("--workers: they end as soon as they begin; the lines above say why")


def _work(work: Callable[[int], None], number: int, alive: int) -> None:
    """A worker from its first step to its last."""
    # Ctrl-C in a terminal reaches a whole group of processes; the workers are told by the one that forked them.
    os.setpgid(0, 0)
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_DFL)
    # Until it can do what they ask for.
    for one in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(one, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    status = 1
    try:
        work(number)
        status = 0
    except UserError as error:
        print(first_line(error), file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_with(alive: int) -> None:
    """End in good order when the process that forked this one is gone."""
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _reason(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
