"""Several processes that answer on one port: forked from one that has loaded the model, so that they share its memory.

Each has an event loop, an engine and a connection to the store of its own; a store's transactions keep the records of
users right, whoever writes them.
"""

from __future__ import annotations

import asyncio
import mmap
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from logging import getLogger
from pathlib import Path

from recbole_ssm.errors import UserError, first_line

# A system without SIGHUP has no fork either, but this module can be imported there.
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
PASSED_ON = (signal.SIGTERM, signal.SIGINT, HANGUP)
COUNTS = "PROMETHEUS_MULTIPROC_DIR"
"""Names, in the environment, the folder by which prometheus_client adds up what processes count. The package reads it
when it is imported, so it is set before."""
TOO_OFTEN = 3
"""A server ends where so many workers in a row end before they serve, and no other one serves."""
SOON = 5.0
"""A worker that lived for fewer seconds ended soon."""
AGAIN_AFTER = 1.0
"""Seconds after which another worker is started in place of one that ended soon."""
FOLLOW_WITHIN = 60.0
"""Seconds in which every worker must have loaded a model that one of them was told to serve."""


class Team:
    """What the workers of a server know of each other, in memory that they share: the model that was chosen last, and
    which choice each of them serves.

    Choices are numbered from 1; before the first one, a worker serves choice 0, the model that it was forked with.

    Args:
        count: how many workers there are.
    """

    _CHOSEN = struct.Struct("<QH4094s64s")
    _MEMBER = struct.Struct("<qQ")

    def __init__(self, count: int) -> None:
        self._count = count
        self._memory = mmap.mmap(-1, self._CHOSEN.size + count * self._MEMBER.size)
        self._lock = multiprocessing.get_context("fork").Lock()

    @property
    def chosen(self) -> tuple[int, Path]:
        """The number of the last choice, and the place of its model."""
        with self._lock:
            number, length, name, _ = self._CHOSEN.unpack_from(self._memory)
        return number, Path(os.fsdecode(name[:length]))

    def choose(self, place: Path, digest: str, after: int | None = None) -> int:
        """Tell all other workers to serve a model that this one serves already; the number of the choice.

        Args:
            place: of the model.
            digest: of the file that was loaded from there, in hexadecimal.
            after: the choice that this worker follows. It stays the last one where the file is the same; where a run
                that still trains has put a newer file there, this is a new choice, and all workers follow to it. A
                choice that another worker made meanwhile stays too.
        """
        name = os.fsencode(place)
        with self._lock:
            last, _, _, wanted = self._CHOSEN.unpack_from(self._memory)
            if after is not None and (last != after or wanted == digest.encode()):
                return after
            choice = last + 1
            self._CHOSEN.pack_into(self._memory, 0, choice, len(name), name, digest.encode())
        for pid, _ in self._members():
            if pid not in (0, os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
        return choice

    async def follow(self, choice: int) -> None:
        """Wait until all workers serve a choice, or a later one.

        Raises:
            TimeoutError: one of them does not.
        """
        until = time.monotonic() + FOLLOW_WITHIN
        while any(pid == 0 or served < choice for pid, served in self._members()):
            if time.monotonic() > until:
                raise TimeoutError
            await asyncio.sleep(0.01)

    def note(self, number: int, choice: int) -> None:
        """A worker that can be told of choices says which one it serves."""
        self._MEMBER.pack_into(self._memory, self._place(number), os.getpid(), choice)

    def remove(self, number: int) -> bool:
        """A worker has ended; whether it had served."""
        pid, _ = self._members()[number]
        self._MEMBER.pack_into(self._memory, self._place(number), 0, 0)
        return pid != 0

    @property
    def serves(self) -> bool:
        """Whether any worker serves."""
        return any(pid for pid, _ in self._members())

    def _place(self, number: int) -> int:
        return self._CHOSEN.size + number * self._MEMBER.size

    def _members(self) -> list[tuple[int, int]]:
        """The process of each worker, 0 where there is none, and the choice that it serves."""
        return [self._MEMBER.unpack_from(self._memory, self._place(number)) for number in range(self._count)]


def supervise(work: Callable[[int, socket.socket], None], sockets: Sequence[socket.socket], team: Team) -> None:
    """Keep forked processes at work, one for each socket, until SIGTERM or SIGINT; another one takes the place of one
    that ends before.

    SIGTERM and SIGINT reach the workers as SIGTERM. SIGHUP reaches one of them, which tells the others.

    Args:
        work: what a worker does, by its number and with its socket.
        sockets: where they listen. When the workers are told to end, all of them are closed here.
        team: what the workers share; one that has ended is taken out of it.

    Raises:
        UserError: workers end as soon as they begin, and none serves.
    """
    workers: dict[int, tuple[int, float]] = {}
    stopping = False
    # The reading end comes to its end when this process does, however it ends.
    alive, held = os.pipe()

    def pass_on(number: int, frame: object) -> None:
        nonlocal stopping
        is_end = number in (signal.SIGTERM, signal.SIGINT)
        if is_end:
            stopping = True
            # Whoever connects from now on is refused, in place of waiting for workers that answer no more.
            for one in sockets:
                one.close()
        for pid in list(workers)[: None if is_end else 1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if is_end else number)

    def begin(number: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        try:
            while not stopping:
                try:
                    pid = os.fork()
                    break
                except OSError as error:
                    getLogger().error(f"worker {number} cannot be started ({error}); it is tried again")
                    time.sleep(AGAIN_AFTER)
            else:
                return
            if pid == 0:
                os.close(held)
                for other in sockets:
                    if other is not sockets[number]:
                        other.close()
                _work(lambda: work(number, sockets[number]), alive)
            workers[pid] = number, time.monotonic()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)

    for one in PASSED_ON:
        signal.signal(one, pass_on)
    for number in range(len(sockets)):
        begin(number)
    failures, gave_up = 0, False
    while workers:
        pid, status = os.waitpid(-1, 0)
        number, since = workers.pop(pid)
        had_served = team.remove(number)
        if stopping:
            continue
        failures = 0 if had_served else failures + 1
        if failures >= TOO_OFTEN and not team.serves:
            gave_up = True
            pass_on(signal.SIGTERM, None)
            continue
        getLogger().error(f"worker {number} ended ({_reason(status)}); another one takes its place")
        if failures or time.monotonic() - since < SOON:
            time.sleep(AGAIN_AFTER)
        begin(number)
    if gave_up:
        raise UserError("--workers: they end as soon as they begin; the lines above say why")


def _work(work: Callable[[], None], alive: int) -> None:
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
        work()
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
