"""The thread that does an engine's work: in how large pieces."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from recbole_ssm.serving.visits import Visit
from recbole_ssm.serving.worker import BusyError, Worker


def pieces(callers, rounds=30):
    """The sizes of the pieces of work for callers who come again soon after they are answered."""
    sizes = []

    def visit(visits):
        sizes.append(len(visits))
        time.sleep(0.008)
        return [visit.user for visit in visits]

    async def call(worker, number):
        for _ in range(rounds):
            # Not all at the same moment, as from sockets.
            await asyncio.sleep(0.0004 * number)
            assert await worker.visit([Visit(str(number))]) == [str(number)]

    async def run():
        worker = Worker(SimpleNamespace(visit=visit, tidy=lambda: iter(())), tidies=False)
        await asyncio.gather(*(call(worker, number) for number in range(callers)))
        await worker.close()

    asyncio.run(run())
    return sizes


def test_callers_who_come_again_are_served_together():
    sizes = pieces(6)
    assert sum(sizes) == 6 * 30
    # How often all six are there in time depends on what else the machine does.
    assert max(sizes) == 6


def test_one_who_was_there_is_waited_for():
    async def run():
        worker = Worker(SimpleNamespace(tidy=lambda: iter(())), tidies=False)
        await worker.close()
        jobs = [SimpleNamespace(visits=())]
        threading.Timer(0.05, worker._jobs.put, [None]).start()
        worker._gather(jobs, present=2, until=time.monotonic() + 60)
        assert len(jobs) == 2

    asyncio.run(run())


def test_nobody_is_waited_for_who_was_not_there():
    async def run():
        worker = Worker(SimpleNamespace(tidy=lambda: iter(())), tidies=False)
        await worker.close()
        jobs, begin = [SimpleNamespace(visits=())], time.monotonic()
        worker._gather(jobs, present=1, until=begin + 60)
        assert len(jobs) == 1 and time.monotonic() < begin + 30

    asyncio.run(run())


def test_calls_are_answered_one_after_the_other_and_refused_when_their_turn_comes_too_late():
    """All of them wait together: a visit, a call that goes on until the visit is answered, and others behind it."""
    all_wait, visited, turn = threading.Event(), threading.Event(), []

    async def run():
        engine = SimpleNamespace(visit=lambda visits: [visit.user for visit in visits], tidy=lambda: iter(()))
        worker = Worker(engine, tidies=False)
        works = [
            worker.call(all_wait.wait),
            worker.visit([Visit("u")]),
            worker.call(lambda: visited.wait(5)),
            worker.call(lambda: setattr(worker, "_longest_wait", -1.0)),
            worker.call(lambda: turn.append("too late")),
            worker.visit([Visit("v")]),
        ]
        _, visit, going, _, *late = [asyncio.create_task(work) for work in works]
        await asyncio.sleep(0)
        all_wait.set()
        assert await visit == ["u"]
        visited.set()
        assert await going
        for one in late:
            with pytest.raises(BusyError, match="waited too long"):
                await one
        await worker.close()

    asyncio.run(run())
    assert not turn
