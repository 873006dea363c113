"""What a server counts, in Prometheus' terms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from recbole_ssm.serving.store import Store, StoreError
from recbole_ssm.serving.visits import Visited
from recbole_ssm.serving.workers import COUNTS

BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self, store: Store) -> None:
        self.registry = CollectorRegistry()
        about: dict[str, Any] = {"registry": self.registry}
        self._calls = Histogram(
            "recbole_ssm_call_seconds", "Calls by route and status.", ["route", "status"], buckets=BUCKETS, **about
        )
        self._parts = Histogram(
            "recbole_ssm_part_seconds",
            "Parts of the work for the callers that were served together: store, step, score, top_k.",
            ["part"],
            buckets=BUCKETS,
            **about,
        )
        self._events = Counter(
            "recbole_ssm_events", "Events that were taken, repeated (a known id) or skipped (an unknown item).",
            ["outcome"], **about,
        )  # fmt: skip
        self._states = Counter(
            "recbole_ssm_states",
            "States that were stored (a hit), rebuilt (lost, or of another model), or first (none was written yet).",
            ["outcome"],
            **about,
        )
        self._size = _Size(store)
        self.registry.register(self._size)
        # Looking a child up by its labels costs more than counting does.
        self._labelled: dict[Any, Any] = {}

    def page(self) -> bytes:
        """What Prometheus reads; of several workers, what all of them have counted."""
        if COUNTS not in os.environ:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        registry.register(self._size)
        return generate_latest(registry)

    def observe_call(self, route: str, status: int, seconds: float) -> None:
        """A call was answered."""
        self._of(self._calls, route, status).observe(seconds)

    def observe_part(self, part: str, seconds: float) -> None:
        """A part of the work was done."""
        self._of(self._parts, part).observe(seconds)

    def count_events(self, found: Visited) -> None:
        """A visit brought events."""
        for outcome in ("taken", "repeated", "skipped"):
            if number := getattr(found, outcome):
                self._of(self._events, outcome).inc(number)

    def count_state(self, outcome: str) -> None:
        """A state was needed."""
        self._of(self._states, outcome).inc()

    def _of(self, metric: Any, *labels: Any) -> Any:
        """The part of a metric that has these labels."""
        key = (metric, *labels)
        if key not in self._labelled:
            self._labelled[key] = metric.labels(*labels)
        return self._labelled[key]


class _Size:
    """Users and bytes of a store, when they are asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Both numbers; none where the store cannot be read."""
        try:
            users, size = len(self._store), self._store.nbytes
        except StoreError:
            return
        yield GaugeMetricFamily("recbole_ssm_users", "Users in the store.", users)
        yield GaugeMetricFamily("recbole_ssm_store_bytes", "Bytes of the store.", size)
