"""The thread that does an engine's work for callers who wait in an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from logging import getLogger
from queue import Empty, SimpleQueue
from typing import Any

from recbole_ssm.serving.engine import Engine
from recbole_ssm.serving.visits import Visit, Visited

VISITS_AT_ONCE = 256
"""So many visits share a transaction at most."""
LONGEST_GATHERING = 0.005
"""Seconds for which a piece of work waits for callers at most."""
TIDY_EVERY = 3600.0
"""Seconds from the end of one walk through all users to the next."""


class BusyError(RuntimeError):
    """Nothing was done, because too many callers wait, or this one waited too long."""


@dataclass(slots=True)
class _Job:
    visits: Sequence[Visit] | None
    function: Callable[[], Any]
    future: asyncio.Future[Any]
    since: float = field(default_factory=time.monotonic)


class Worker:
    """Does what callers want in one thread. What comes while it works is done together next: the busier, the larger the
    pieces. Those who were just answered mostly come again at once; the next piece waits for them for up to half the
    time that the last one took, because one piece for all costs less than two that take turns.

    Only visits are done together. Any other call ends a piece, and begins when the visits before it are answered.

    Args:
        engine: whose work it does.
        most_waiting: with so many callers waiting, a further one is refused.
        longest_wait: a caller who has waited for more seconds when the turn comes is refused then.
        tidies: whether it goes through all users while nobody waits.
    """

    def __init__(
        self, engine: Engine, *, most_waiting: int = 2048, longest_wait: float = 10.0, tidies: bool = True
    ) -> None:
        self.engine = engine
        self._most_waiting, self._longest_wait = most_waiting, longest_wait
        self._waiting = 0
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._tidies = tidies
        self._tidying: Iterator[None] | None = None
        self._tidied = 0.0
        self.tidy()
        self._thread = threading.Thread(target=self._work, name="engine")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    async def visit(self, visits: Sequence[Visit]) -> list[Visited | Exception]:
        """:meth:`Engine.visit`.

        Raises:
            BusyError: too many callers wait.
        """
        found: list[Visited | Exception] = await self._done(visits, _nothing)
        return found

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that runs between visits."""
        return await self._done(None, function)

    async def _done(self, visits: Sequence[Visit] | None, function: Callable[[], Any]) -> Any:
        if self._waiting >= self._most_waiting:
            raise BusyError(f"{self._waiting:,} callers wait; try again later")
        job = _Job(visits, function, self._loop.create_future())
        self._waiting += 1
        self._jobs.put(job)
        return await job.future

    def tidy(self) -> None:
        """Begin to go through all users; called between visits."""
        if self._tidies:
            self._tidying = self.engine.tidy()

    async def close(self) -> None:
        """Do what is waiting, and end."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    # --- in the thread ---

    def _work(self) -> None:
        going = True
        # How many callers there were a moment ago, and how long their piece of work took.
        present, took = 1, 0.0
        while going:
            try:
                jobs = [self._jobs.get(timeout=0 if self._tidying else 1.0)]
            except Empty:
                self._tidy_on()
                continue
            self._gather(jobs, present, time.monotonic() + min(took / 2, LONGEST_GATHERING))
            going = jobs[-1] is not None
            begin = time.monotonic()
            for done in self._results([job for job in jobs if job is not None]):
                self._loop.call_soon_threadsafe(self._deliver, done)
            took, present = time.monotonic() - begin, len(jobs) + self._jobs.qsize()

    def _gather(self, jobs: list[_Job | None], present: int, until: float) -> None:
        """Add what waits, and until a moment what comes, as long as there are fewer callers than before; a call
        that is no visit is the last.
        """
        visits = 0
        while (job := jobs[-1]) is not None and job.visits is not None and visits < VISITS_AT_ONCE:
            visits += len(job.visits)
            left = until - time.monotonic() if len(jobs) < present else 0.0
            try:
                jobs.append(self._jobs.get(timeout=left) if left > 0 else self._jobs.get_nowait())
            except Empty:
                return

    def _results(self, jobs: Sequence[_Job]) -> Iterator[list[tuple[_Job, Any]]]:
        """What became of the visits of a piece, and then of the call behind them."""
        visiting = [job for job in jobs if job.visits is not None]
        if visiting:
            yield self._in_time(visiting, self._visited)
        if calling := jobs[len(visiting) :]:
            yield self._in_time(calling, lambda jobs: [_outcome(job.function) for job in jobs])

    def _in_time(self, jobs: Sequence[_Job], work: Callable[[Sequence[_Job]], Sequence[Any]]) -> list[tuple[_Job, Any]]:
        """What work makes of the jobs of those who have not waited too long."""
        late = time.monotonic() - self._longest_wait
        refused = [(job, BusyError("waited too long")) for job in jobs if job.since < late]
        jobs = [job for job in jobs if job.since >= late]
        return [*refused, *zip(jobs, work(jobs))]

    def _visited(self, jobs: Sequence[_Job]) -> Sequence[Any]:
        """What became of each job's visits."""
        visits = [visit for job in jobs for visit in job.visits or ()]
        found = _outcome(lambda: self.engine.visit(visits)) if visits else []
        if isinstance(found, Exception):
            return [found] * len(jobs)
        rest = iter(found)
        return [list(islice(rest, len(job.visits or ()))) for job in jobs]

    def _tidy_on(self) -> None:
        if self._tidying is None:
            if time.monotonic() - self._tidied > TIDY_EVERY:
                self.tidy()
            return
        found = _outcome(lambda: next(self._tidying, self))  # type: ignore[arg-type]
        if isinstance(found, Exception):
            getLogger().warning(f"users were not gone through: {found}")
        if found is not None:
            self._tidying, self._tidied = None, time.monotonic()

    def _deliver(self, done: Sequence[tuple[_Job, Any]]) -> None:
        """Back in the event loop: wake those who wait."""
        self._waiting -= len(done)
        for job, found in done:
            # Whose client is gone waits no longer.
            if job.future.done():
                continue
            if isinstance(found, Exception):
                job.future.set_exception(found)
            else:
                job.future.set_result(found)


def _nothing() -> None:
    """What a job of visits calls."""


def _outcome(function: Callable[[], Any]) -> Any:
    """What a function returns, or the exception that it raises."""
    try:
        return function()
    except Exception as error:
        return error
