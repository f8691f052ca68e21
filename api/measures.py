"""Prometheus measures of the API process, and of the queues by a look at the rows."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

MEDIA_TYPE: Final = CONTENT_TYPE_LATEST
_ENDED_SECONDS: Final = 60.0
Jobs = Mapping[tuple[str, str], int]
"""Numbers by queue and status."""
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class Measures:
    """Counters of one app; no label names a team or an id."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._ended: tuple[float, Jobs] = (-math.inf, {})
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._requests = Counter(
            "grit_http_requests",
            "Answered requests",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "grit_http_request_seconds",
            "Time to the last byte of an answer",
            ["method", "route"],
            registry=self.registry,
        )
        self._jobs = Gauge(
            "grit_jobs", "Jobs by queue and status", ["queue", "status"], registry=self.registry
        )
        self._workers = Gauge(
            "grit_live_workers", "Workers seen lately", ["device"], registry=self.registry
        )
        self._waiting = Gauge(
            "grit_inference_waiting",
            "Inference requests that wait for a worker",
            ["device"],
            registry=self.registry,
        )

    def observe(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        key = (method, route, status)
        found = self._children.get(key)
        if found is None:
            shown = method if method in _METHODS else "other"
            found = (
                self._requests.labels(shown, route, str(status)),
                self._seconds.labels(shown, route),
            )
            if method in _METHODS:  # others are the caller's words, and may be without number
                self._children[key] = found
        found[0].inc()
        found[1].observe(seconds)

    def ended_jobs(self, count: Callable[[], dict[tuple[str, str], int]]) -> Jobs:
        """Return the number of ended jobs, counted at most once a minute.

        There may be millions of them, and anybody may ask for the measures.
        """
        at, known = self._ended
        if time.monotonic() - at > _ENDED_SECONDS:
            known = count()
            self._ended = time.monotonic(), known
        return known

    def render(
        self,
        *,
        jobs: Jobs,
        workers: Mapping[str, int],
        waiting: Mapping[str, int],
    ) -> bytes:
        """Return the exposition text, with jobs, workers and waiting requests as they are now."""
        self._jobs.clear()
        for (queue, status), count in jobs.items():
            self._jobs.labels(queue, status).set(count)
        self._workers.clear()
        for device, count in workers.items():
            self._workers.labels(device).set(count)
        self._waiting.clear()
        for device, count in waiting.items():
            self._waiting.labels(device).set(count)
        return bytes(generate_latest(self.registry))
