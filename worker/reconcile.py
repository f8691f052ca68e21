"""What keeps the promise when bells and workers are lost: every worker looks at the rows.

The reaper takes back jobs whose lease has expired; the dispatcher rings for queued rows that nobody
has rung for lately. Both are compare-and-set in the store, so any number of workers may do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from store import attempts
from store.database import run_in_transaction

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from store.queue import Doorbell
    from store.settings import Settings

_log = structlog.get_logger(__name__)


def reconcile(engine: Engine, doorbell: Doorbell, settings: Settings) -> None:
    """Reap expired leases, then ring every queue that has ready rows whose bell is due."""
    policy = attempts.RetryPolicy.of(settings)
    reaped = run_in_transaction(
        engine, lambda session: attempts.reap_expired(session, policy=policy)
    )
    if reaped:
        _log.warning("leases_expired", jobs=reaped)
    queues = run_in_transaction(
        engine,
        lambda session: attempts.queues_to_ring(
            session,
            again_after_seconds=settings.ring_again_seconds,
            seen_within_seconds=settings.worker_seen_seconds,
        ),
    )
    for queue in queues:
        rung = doorbell.ring(queue)
        _log.info("rang_again", queue=queue, taken=rung)
