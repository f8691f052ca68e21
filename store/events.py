"""The event log of a job, and the numbers its attempts report."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from store.models import Event, LayerStatistics, Metric


def append(
    session: Session,
    job_id: str,
    type: str,  # noqa: A002 - the wire's word
    payload: dict[str, Any],
    attempt: int | None = None,
) -> Event:
    """Append a fact with the next number; with an `attempt`, only while that is the current one.

    Raises:
        NotFound: If there is no such job.
        LeaseLost: If the attempt is no longer the current one.
    """
    raise NotImplementedError


def read(session: Session, job_id: str, *, after: int = 0, limit: int = 100) -> list[Event]:
    """Return a job's events after a sequence number, in order."""
    raise NotImplementedError


def record_progress(
    session: Session, job_id: str, attempt: int, events: Sequence[dict[str, Any]]
) -> None:
    """Record what training told, as JSON events (`grit_core.events.event_to_json`), in order.

    `step_completed` and `evaluated` become metrics of their step, and one `progress` event for the
    whole batch; `curvature_observed` becomes layer statistics; the others become events of their own.

    Raises:
        LeaseLost: If the attempt is no longer the current one; nothing is recorded.
    """
    raise NotImplementedError


def read_metrics(
    session: Session, job_id: str, *, after_step: int = -1, limit: int | None = None
) -> list[Metric]:
    """Return a job's metrics in the order of their steps."""
    raise NotImplementedError


def read_layer_statistics(session: Session, job_id: str) -> list[LayerStatistics]:
    """Return a job's layer statistics in the order of their steps."""
    raise NotImplementedError
