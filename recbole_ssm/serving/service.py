"""What the calls of a server share: the engine, its thread, its limits, and the model that is served."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

from recbole_ssm.errors import first_line
from recbole_ssm.serving.engine import Engine
from recbole_ssm.serving.metrics import Metrics
from recbole_ssm.serving.served import Served
from recbole_ssm.serving.store import Store
from recbole_ssm.serving.visits import Visit, Visited
from recbole_ssm.serving.worker import BusyError, Worker
from recbole_ssm.serving.workers import Team


class Limits(NamedTuple):
    """What a server takes at most."""

    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    waiting_callers: int = 2048
    waiting_seconds: float = 10.0
    drain_seconds: int = 30


DEFAULT_LIMITS = Limits()


@dataclass
class Server:
    """What the calls share.

    Args:
        load: a checkpoint file or a run's folder -> the model as it is served.
        place: of the model that is served first.
        served: that model.
        store: the users' records; it is closed when the server ends.
        models: the folder of models that may be served instead; None lets none.
        token: of every caller; None asks for none.
        refuse_unknown: refuse events of unknown items, in place of counting them.
        limits: what is taken at most.
        options: further ones of :class:`Engine`.
        team: the workers of which this server is one; None where it answers by itself.
        number: which of them. Worker 0 goes through all users after a new model; the others leave that to it.
    """

    load: Callable[[Path], Served]
    place: Path
    served: Served
    store: Store
    models: Path | None = None
    token: str | None = None
    refuse_unknown: bool = False
    limits: Limits = DEFAULT_LIMITS
    options: dict[str, Any] | None = None
    team: Team | None = None
    number: int = 0

    def __post_init__(self) -> None:
        self.choice = 0
        self.metrics = Metrics(self.store)
        observed: dict[str, Any] = {"observe": self.metrics.observe_part, "count": self.metrics.count_state}
        self.engine = Engine(self.served, self.store, **observed, **(self.options or {}))
        self.worker: Worker | None = None
        self._swapping = asyncio.Lock()

    @asynccontextmanager
    async def running(self, app: Any) -> AsyncIterator[None]:
        """From the first call to the last."""
        self.worker = Worker(
            self.engine,
            most_waiting=self.limits.waiting_callers,
            longest_wait=self.limits.waiting_seconds,
            tidies=self.number == 0,
        )
        loads: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        if hasattr(signal, "SIGHUP"):
            with suppress(RuntimeError, ValueError):
                loop.add_signal_handler(signal.SIGHUP, lambda: loads.add(loop.create_task(self._reload())))
        if self.team is not None:
            loop.add_signal_handler(signal.SIGUSR1, lambda: loads.add(loop.create_task(self._follow())))
            self.team.note(self.number, self.choice)
            # A model may have been chosen while this worker began.
            loads.add(loop.create_task(self._follow()))
        try:
            yield
        finally:
            await self.worker.close()
            self.store.close()

    async def visit(self, visit: Visit) -> Visited:
        """What the engine makes of a visit.

        Raises:
            Exception: what became of it instead.
        """
        (found,) = await self.visit_all([visit])
        assert isinstance(found, Visited)
        return found

    async def visit_all(self, visits: Sequence[Visit]) -> list[Visited | Exception]:
        """What the engine makes of each visit of one call.

        Raises:
            Exception: what became of the first, where every visit failed.
        """
        assert self.worker is not None
        found = await self.worker.visit(visits)
        for one in found:
            if isinstance(one, Visited):
                self.metrics.count_events(one)
        if isinstance(found[0], Exception) and not any(isinstance(one, Visited) for one in found):
            raise found[0]
        return found

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """The result of a function of the engine."""
        assert self.worker is not None
        return await self.worker.call(lambda: function(self.engine))

    async def choose(self, place: Path) -> str:
        """Serve another model from the next call on, in all workers; its digest.

        Raises:
            UserError: it cannot be loaded; the former goes on.
            BusyError: too many callers wait, and the former goes on; or another worker does not serve it.
        """
        async with self._swapping:
            digest = await self._serve(place)
            if self.team is None:
                return digest
            choice = self.choice = self.team.choose(place, digest)
            self.team.note(self.number, choice)
        while True:
            try:
                await self.team.follow(choice)
            except TimeoutError:
                raise BusyError("a worker does not serve this model yet; the log says more") from None
            last, chosen = self.team.chosen
            if chosen != place:
                raise BusyError("another model was chosen at the same moment, and is served")
            if last == choice:
                return self.engine.served.digest
            # A run that still trains has put a newer file there, and a worker that found it told all others.
            choice = last

    def begin_with_choice(self) -> None:
        """Serve the model that was chosen before this worker was forked, if one was.

        Raises:
            UserError: it cannot be loaded.
        """
        assert self.team is not None
        choice, place = self.team.chosen
        if choice:
            self.engine.served, self.place = self.load(place), place
            self.choice = self.team.choose(place, self.engine.served.digest, after=choice)

    async def _serve(self, place: Path) -> str:
        """Load a model, and serve it in this process."""
        served = await asyncio.to_thread(self.load, place)
        worker = self.worker
        assert worker is not None

        def change(engine: Engine) -> None:
            engine.served = served
            worker.tidy()

        await self.call(change)
        self.place = place
        return served.digest

    async def _follow(self) -> None:
        """Serve the model that another worker was told to."""
        assert self.team is not None
        async with self._swapping:
            while (chosen := self.team.chosen)[0] != self.choice:
                try:
                    digest = await self._serve(chosen[1])
                except BusyError:
                    await asyncio.sleep(0.1)
                    continue
                except Exception as error:
                    # Two models side by side would compute each other's states again and again.
                    getLogger().error(f"{chosen[1]} cannot be loaded, so this worker ends; {first_line(error)}")
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                getLogger().warning(f"serving {chosen[1]}, digest {digest}")
                self.choice = self.team.choose(chosen[1], digest, after=chosen[0])
                self.team.note(self.number, self.choice)

    async def _reload(self) -> None:
        """Read the checkpoint again."""
        try:
            getLogger().warning(f"serving {self.place}, digest {await self.choose(self.place)}")
        except Exception as error:
            getLogger().error(f"SIGHUP: the former model goes on; {first_line(error)}")

    def refuse(self, items: Iterable[str]) -> None:
        """Refuse unknown items, where they are refused.

        Raises:
            UserError: one is.
        """
        if self.refuse_unknown:
            self.engine.served.catalogue.ids(items, "item")
