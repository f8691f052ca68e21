"""The queues of training and of inference: who serves them, and what waits."""

from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal

import structlog
from sqlalchemy.orm import Session

from api.services import Services
from store import jobs, workers
from store.errors import StoreError
from store.lifecycle import ACTIVE
from store.models import Worker
from store.queue import AUTO_QUEUES, INFERENCE_QUEUES, TRAINING_QUEUES, serving_device

Kind = Literal["training", "inference"]
KINDS: dict[str, Kind] = {
    **dict.fromkeys((*TRAINING_QUEUES, *AUTO_QUEUES), "training"),
    **dict.fromkeys(INFERENCE_QUEUES, "inference"),
}
"""Every queue that there is, in the order in which they are shown."""
MOST_WAITING: Final = 10_000
"""Readiness is asked for often and by anyone, so that jobs are counted no further."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class QueueState:
    """A queue as it stands."""

    queue: str
    kind: Kind
    workers: int
    """Live workers that serve it: of a strategy's queue, those that would claim from it now."""
    waiting: int | None
    """Jobs, counted up to `MOST_WAITING`, or requests; none while the broker, which has the
    requests, does not answer."""
    running: int | None
    """Jobs; none of an inference queue, where it is not counted."""
    oldest_wait_seconds: float | None
    """Of the jobs that wait; none where none does, and of an inference queue."""


def read_queues(session: Session, services: Services) -> list[QueueState]:
    """Return every queue as it stands, those without work and workers too."""
    live = [worker for worker in read_workers(session, services) if not worker.stopping]
    served = Counter(queue for worker in live for queue in worker.queues)
    waiting = jobs.count_waiting(session, most=MOST_WAITING)
    running: Counter[str] = Counter()
    for (queue, _), count in jobs.count_by_status(session, ACTIVE).items():
        running[queue] += count
    waits = jobs.oldest_waits(session)
    requests = count_requests(services)
    return [
        QueueState(
            queue=queue,
            kind=kind,
            workers=_count_serving(queue, served),
            waiting=waiting[queue] if kind == "training" else requests[queue],
            running=running[queue] if kind == "training" else None,
            oldest_wait_seconds=waits.get(queue),
        )
        for queue, kind in KINDS.items()
    ]


def read_workers(session: Session, services: Services) -> list[Worker]:
    """Return the live workers, those that are stopping among them."""
    seconds = services.settings.worker_seen_seconds
    return workers.live_workers(session, seen_within_seconds=seconds)


def count_requests(services: Services) -> dict[str, int | None]:
    """Count the waiting requests of each inference queue; none while the broker is silent."""
    try:
        return {
            queue: services.mailbox.num_waiting(queue.removeprefix("infer."))
            for queue in INFERENCE_QUEUES
        }
    except StoreError as error:
        _log.warning("waiting_not_counted", reason=str(error))
        return dict.fromkeys(INFERENCE_QUEUES)


def _count_serving(queue: str, served: Counter[str]) -> int:
    """Count the workers of a queue, or of the device that claims from it now."""
    device = queue if queue in INFERENCE_QUEUES else serving_device(queue, served)
    return 0 if device is None else served[device]
