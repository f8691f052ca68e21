"""Which workers are alive, and what they serve."""

from typing import Any, Final

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from store.database_time import database_now, database_time_in
from store.errors import NotFound
from store.ids import new_id
from store.models import Worker

SEEN_WITHIN_SECONDS: Final = 30.0
"""A worker silent for longer does not count as live, unless the settings say otherwise."""
_FORGOTTEN_AFTER_SECONDS: Final = 86_400.0


def register_worker(
    session: Session,
    *,
    hostname: str,
    process_id: int,
    queues: list[str],
    device: str,
    id: str | None = None,  # noqa: A002
    details: dict[str, Any] | None = None,
) -> Worker:
    """Record a worker that starts; its id is the `worker_id` everywhere.

    Workers silent for a day are forgotten on the way.
    """
    worker = Worker(
        id=id or new_id("wrk"),
        hostname=hostname,
        process_id=process_id,
        queues=queues,
        device=device,
        details=details,
    )
    session.execute(
        delete(Worker).where(Worker.seen_at < database_time_in(-_FORGOTTEN_AFTER_SECONDS)),
        execution_options={"synchronize_session": False},
    )
    session.add(worker)
    session.flush()
    return worker


def beat(
    session: Session,
    worker_id: str,
    *,
    stopping: bool = False,
    details: dict[str, Any] | None = None,
) -> None:
    """Note that a worker is alive, by the database's clock.

    Raises:
        NotFound: If it was never registered, or was removed.
    """
    values: dict[str, Any] = {"seen_at": database_now(), "stopping": stopping}
    if details is not None:
        values["details"] = details
    seen = session.scalars(
        update(Worker).where(Worker.id == worker_id).values(**values).returning(Worker.id),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    if seen is None:
        raise NotFound("worker", worker_id)


def remove_worker(session: Session, worker_id: str) -> None:
    """Forget a worker that stops; its leases expire by themselves."""
    session.execute(
        delete(Worker).where(Worker.id == worker_id),
        execution_options={"synchronize_session": False},
    )


def live_workers(
    session: Session, *, seen_within_seconds: float = SEEN_WITHIN_SECONDS
) -> list[Worker]:
    """Return the workers seen lately, by the database's clock."""
    return list(
        session.scalars(
            select(Worker)
            .where(Worker.seen_at >= database_time_in(-seen_within_seconds))
            .order_by(Worker.id)
        )
    )


def live_queues(session: Session, *, seen_within_seconds: float = SEEN_WITHIN_SECONDS) -> set[str]:
    """Return the queues that some live worker serves."""
    return {
        queue
        for worker in live_workers(session, seen_within_seconds=seen_within_seconds)
        if not worker.stopping
        for queue in worker.queues
    }
