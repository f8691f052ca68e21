"""Which workers are alive, and what they serve."""

from typing import Any

from sqlalchemy.orm import Session

from store.models import Worker


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
    """Record a worker that starts; the row's id is its `worker_id` everywhere."""
    raise NotImplementedError


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
    raise NotImplementedError


def remove_worker(session: Session, worker_id: str) -> None:
    """Forget a worker that stops; its leases expire by themselves."""
    raise NotImplementedError


def live_workers(session: Session, *, seen_within_seconds: float = 30.0) -> list[Worker]:
    """Return the workers seen lately by the database's clock, and forget those silent for a day."""
    raise NotImplementedError


def live_queues(session: Session, *, seen_within_seconds: float = 30.0) -> set[str]:
    """Return the queues that some live worker serves."""
    raise NotImplementedError
