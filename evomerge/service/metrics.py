"""What a server measures, for Prometheus: how its store stands, and how long it takes to answer.

Numbers of searches are read from the store when they are asked for. No search is named, so there
are as many series in a year as today; nothing is said of scores.
"""

import time
from collections.abc import Iterator

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evomerge.service.events import Broadcaster
from evomerge.service.scheduler import Scheduler
from evomerge.store import Store
from evomerge.store.feed import Feed

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # seconds
_METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "DELETE"})


class Metrics:
    """Of one server."""

    def __init__(self, store: Store, scheduler: Scheduler, broadcaster: Broadcaster) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfStore(store, scheduler, broadcaster))
        self._seconds = Histogram(
            "evomerge_request_seconds",
            "Seconds until a response began.",
            ("method", "route", "status"),
            buckets=_BUCKETS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """In Prometheus' text format. Blocks; raises StoreUnavailable."""
        return generate_latest(self._registry)

    def install(self, app: FastAPI) -> None:
        """Have every request of an app measured."""
        app.add_middleware(_Stopwatch, seconds=self._seconds)


class _Stopwatch:
    def __init__(self, app: ASGIApp, seconds: Histogram) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def send_measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Of paths that nobody serves, and methods, there is no end.
                route = getattr(scope.get("route"), "path", "other")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                labels = method, route, str(message["status"])
                self._seconds.labels(*labels).observe(time.perf_counter() - began)
            await send(message)

        await self._app(scope, receive, send_measured)


class _OfStore(Collector):
    def __init__(self, store: Store, scheduler: Scheduler, broadcaster: Broadcaster) -> None:
        self._feed = Feed(store)
        self._scheduler = scheduler
        self._broadcaster = broadcaster

    def describe(self) -> list[Metric]:
        """Nothing is read of the store to find out what it will be asked for."""
        return []

    def collect(self) -> Iterator[Metric]:
        found = self._feed.totals()
        yield _by_state("evomerge_searches", "Searches by state.", found.searches)
        yield _by_state("evomerge_queue", "Submissions by state.", found.submissions)
        yield _by_state("evomerge_candidates", "Candidates by state.", found.candidates)
        yield CounterMetricFamily(
            "evomerge_evaluations", "Evaluations that were made.", found.evaluations
        )
        yield CounterMetricFamily(
            "evomerge_gpu_seconds",
            "GPU seconds that evaluations took; a CPU counts as one.",
            found.gpu_seconds,
        )
        yield GaugeMetricFamily(
            "evomerge_leads", "Whether this server works off the queue.", self._scheduler.leads
        )
        yield GaugeMetricFamily(
            "evomerge_processes", "Processes at work.", len(self._scheduler.running)
        )
        yield GaugeMetricFamily(
            "evomerge_listeners", "Listeners to live events.", self._broadcaster.listeners
        )


def _by_state(name: str, documentation: str, found: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, documentation, labels=("state",))
    for state, count in sorted(found.items()):
        family.add_metric((state,), count)
    return family
