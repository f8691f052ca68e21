"""What keeps the promise when bells and workers are lost: every worker looks at the rows.

The reaper takes back jobs whose lease has expired; the dispatcher rings for queued rows that nobody
has rung for lately. Both are compare-and-set in the store, so any number of workers may do it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import structlog

from store import attempts
from store.database import run_in_transaction

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from store.queue import Doorbell
    from store.settings import Settings

MAX_UNHEARD: Final = 8
"""Bells of a queue that wait in the broker, after which no further one is rung for old rows."""
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
    for queue, num_due in Counter(queues).items():
        unheard = doorbell.num_unheard(queue)
        # Idle workers hear at once. Where bells wait, all are busy, for hours perhaps: more of them
        # would fill the broker.
        num_bells = 0 if unheard is None else min(num_due, max(0, MAX_UNHEARD - unheard))
        num_rung = sum(doorbell.ring(queue) for _ in range(num_bells))
        if num_rung or unheard is None:
            _log.info("rang_again", queue=queue, bells=num_rung, taken=unheard is not None)
