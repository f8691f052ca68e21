"""Prometheus measures of the API process, and of the queues by a look at the rows."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from api.queues import KINDS
from store.models import JobStatus
from store.queue import AUTO_QUEUES, INFERENCE_QUEUES, TRAINING_QUEUES

MEDIA_TYPE: Final = CONTENT_TYPE_LATEST
_ENDED_SECONDS: Final = 60.0
Jobs = Mapping[tuple[str, str], int]
"""Numbers by queue and status."""
_OWN: Final = "Of this process: sum over the replicas of the API."
_REPEATED: Final = "Every replica of the API reports the same: take the max over them, not the sum."
_JOB_QUEUES: Final = (*TRAINING_QUEUES, *AUTO_QUEUES)
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class Measures:
    """Counters of one app; no label names a team or an id."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._ended: tuple[float, Jobs] = (-math.inf, {})
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._requests = Counter(
            "grit_http_requests_total",
            f"Answered requests. {_OWN}",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "grit_http_request_seconds",
            f"Time to the last byte of an answer. {_OWN}",
            ["method", "route"],
            registry=self.registry,
        )
        self._jobs = Gauge(
            "grit_jobs",
            f"Jobs by queue and status. {_REPEATED}",
            ["queue", "status"],
            registry=self.registry,
        )
        self._oldest = Gauge(
            "grit_oldest_wait_seconds",
            f"How long the longest waiting job of a queue has waited, 0 without one. {_REPEATED}",
            ["queue"],
            registry=self.registry,
        )
        self._workers = Gauge(
            "grit_live_workers",
            "Workers seen lately that take work (none that stops or whose device is in"
            " quarantine), by what they do, their queue and its device; a job of an auto queue is"
            f" claimed by those of a device. {_REPEATED}",
            ["kind", "queue", "device"],
            registry=self.registry,
        )
        self._waiting = Gauge(
            "grit_inference_waiting",
            "Inference requests that wait for a worker, NaN while the broker does not answer."
            f" {_REPEATED}",
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
        waits: Mapping[str, float],
        requests: Mapping[str, int | None],
    ) -> bytes:
        """Return the exposition text. What there is none of is 0, and not left out.

        Args:
            jobs: By queue and status.
            workers: Live ones by queue.
            waits: Seconds of the longest waiting job by queue.
            requests: Waiting inference requests by queue; none: not known.
        """
        none_yet = {(queue, status.value): 0 for queue in _JOB_QUEUES for status in JobStatus}
        for (queue, status), count in {**none_yet, **jobs}.items():
            self._jobs.labels(queue, status).set(count)
        for queue in _JOB_QUEUES:
            self._oldest.labels(queue).set(waits.get(queue, 0.0))
        for queue in (*TRAINING_QUEUES, *INFERENCE_QUEUES):
            device = queue.removeprefix("infer.")
            self._workers.labels(KINDS[queue], queue, device).set(workers.get(queue, 0))
        for queue, num_waiting in requests.items():
            known = math.nan if num_waiting is None else num_waiting
            self._waiting.labels(queue.removeprefix("infer.")).set(known)
        return bytes(generate_latest(self.registry))
