"""What the calls of a server share: the engine, its thread, its limits, and the model that is served."""

from __future__ import annotations

import asyncio
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
from recbole_ssm.serving.worker import Worker


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
        store: the users' records; it is closed when the server ends.
        models: the folder of models that may be served instead; None lets none.
        token: of every caller; None asks for none.
        refuse_unknown: refuse events of unknown items, in place of counting them.
        limits: what is taken at most.
        options: further ones of :class:`Engine`.
    """

    load: Callable[[Path], Served]
    place: Path
    store: Store
    models: Path | None = None
    token: str | None = None
    refuse_unknown: bool = False
    limits: Limits = DEFAULT_LIMITS
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.store)
        observed: dict[str, Any] = {"observe": self.metrics.observe_part, "count": self.metrics.count_state}
        self.engine = Engine(self.load(self.place), self.store, **observed, **(self.options or {}))
        self.worker: Worker | None = None
        self._swapping = asyncio.Lock()

    @asynccontextmanager
    async def running(self, app: Any) -> AsyncIterator[None]:
        """From the first call to the last."""
        self.worker = Worker(
            self.engine, most_waiting=self.limits.waiting_callers, longest_wait=self.limits.waiting_seconds
        )
        reloads: set[asyncio.Task[None]] = set()
        if hasattr(signal, "SIGHUP"):
            with suppress(RuntimeError, ValueError):
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(signal.SIGHUP, lambda: reloads.add(loop.create_task(self._reload())))
        try:
            yield
        finally:
            await self.worker.close()
            self.store.close()

    async def visit(self, visits: Sequence[Visit]) -> list[Visited]:
        """What the engine makes of visits."""
        assert self.worker is not None
        found = await self.worker.visit(visits)
        for one in found:
            self.metrics.count_events(one)
        return found

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """The result of a function of the engine."""
        assert self.worker is not None
        return await self.worker.call(lambda: function(self.engine))

    async def swap(self, place: Path) -> str:
        """Serve another model from the next call on; its digest.

        Raises:
            UserError: it cannot be loaded; the former goes on.
        """
        async with self._swapping:
            served = await asyncio.to_thread(self.load, place)
            await self.call(lambda engine: setattr(engine, "served", served))
            self.place = place
            assert self.worker is not None
            await self.worker.call(self.worker.tidy)
        return served.digest

    async def _reload(self) -> None:
        try:
            getLogger().warning(f"serving {self.place}, digest {await self.swap(self.place)}")
        except Exception as error:
            getLogger().error(f"SIGHUP: the former model goes on; {first_line(error)}")

    def refuse(self, items: Iterable[str]) -> None:
        """Refuse unknown items, where they are refused.

        Raises:
            UserError: one is.
        """
        if self.refuse_unknown:
            self.engine.served.catalogue.ids(items, "item")
