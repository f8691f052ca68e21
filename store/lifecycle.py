"""The life of a job: which status may follow which, and the one function that changes it."""

from typing import Any, Final

from sqlalchemy import func, inspect, null, select, update
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import set_committed_value

from store.database_time import database_now
from store.device_binding import unbound_columns
from store.errors import IllegalTransition, LeaseLost, NotFound
from store.models import Event, Job, JobStatus

STATUS_CHANGED: Final = "status_changed"
"""Type of the event that every transition writes."""

S = JobStatus

TRANSITIONS: Final[dict[JobStatus, frozenset[JobStatus]]] = {
    S.CREATED: frozenset({S.QUEUED, S.CANCELLED}),
    S.QUEUED: frozenset({S.RUNNING, S.PAUSED, S.CANCELLED, S.FAILED}),
    S.RUNNING: frozenset({S.QUEUED, S.PAUSING, S.CANCELLING, S.SUCCEEDED, S.FAILED}),
    S.PAUSING: frozenset({S.PAUSED, S.CANCELLING, S.SUCCEEDED, S.FAILED}),
    S.PAUSED: frozenset({S.QUEUED, S.CANCELLED}),
    S.CANCELLING: frozenset({S.CANCELLED}),
    S.CANCELLED: frozenset({S.QUEUED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset({S.QUEUED}),
}

ACTIVE: Final = frozenset({S.RUNNING, S.PAUSING, S.CANCELLING})
"""An attempt holds the lease."""
ENDED: Final = frozenset({S.CANCELLED, S.SUCCEEDED, S.FAILED})
"""Nothing happens any more unless a user retries."""
OPEN: Final = frozenset(JobStatus) - ENDED
"""Counts against the team's quota of open jobs."""

_SET_BY_INSERT: Final = frozenset(
    column.key for column in Job.__table__.columns if column.default is not None
) | {"user_metadata"}
_LEASE_ENDS: Final[dict[str, Any]] = {"lease_expires_at": null(), "worker_id": null()}
_ENDS: Final[dict[str, Any]] = {**_LEASE_ENDS, "phase": null(), "finished_at": database_now()}
# What a status means for the other columns, so that no caller can forget one.
_CONSEQUENCES: Final[dict[JobStatus, dict[str, Any]]] = {
    S.CREATED: {},
    S.QUEUED: {
        **_LEASE_ENDS,
        "phase": null(),
        "finished_at": null(),
        "last_rung_at": null(),
        "queued_at": database_now(),
    },
    S.RUNNING: {"started_at": func.coalesce(Job.started_at, database_now())},
    S.PAUSING: {},
    S.PAUSED: {**_LEASE_ENDS, "phase": null()},
    S.CANCELLING: {},
    S.CANCELLED: _ENDS,
    S.SUCCEEDED: {**_ENDS, "error": null()},
    S.FAILED: _ENDS,
}


def transition(
    session: Session,
    job_id: str,
    *,
    to: JobStatus,
    expected_attempt: int | None = None,
    reason: str | None = None,
    **columns: Any,
) -> Job:
    """Move a job to a status by compare-and-set and append `status_changed` beside it.

    Args:
        session: The caller's transaction.
        job_id: The job.
        to: The status it gets.
        expected_attempt: The fencing token; another current attempt refuses the move.
        reason: Why, in words for the user; also stored as `status_reason`.
        **columns: Further columns of the row to set in the same statement.

    Raises:
        NotFound: If there is no such job.
        LeaseLost: If another attempt is the current one.
        IllegalTransition: If the job's status does not allow the move.
    """
    job = session.scalars(
        select(Job).where(Job.id == job_id).with_for_update(),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if job is None:
        raise NotFound("job", job_id)
    before = JobStatus(job.status)
    if expected_attempt is not None and (job.attempt != expected_attempt or before not in ACTIVE):
        raise LeaseLost(job_id, attempt=expected_attempt)
    if to not in TRANSITIONS[before]:
        raise IllegalTransition(job_id, status=before, to=to, allowed=TRANSITIONS[before])
    guards = [Job.id == job_id, Job.status == before, Job.attempt == job.attempt]
    values = {"status_reason": reason, **_CONSEQUENCES[to], **columns}
    if to is S.QUEUED:
        values |= unbound_columns(session, job)
    moved = session.scalars(
        update(Job)
        .where(*guards)
        .values(
            status=to,
            version=Job.version + 1,
            last_sequence=Job.last_sequence + 1,
            updated_at=database_now(),
            **values,
        )
        .returning(Job),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).one()
    session.add(
        Event(
            job_id=job_id,
            sequence=moved.last_sequence,
            type=STATUS_CHANGED,
            payload={"from": before, "to": to, "reason": reason},
            attempt=moved.attempt or None,
        )
    )
    session.flush()
    return moved


def record_creation(session: Session, job: Job, *, queued: bool) -> Job:
    """Insert a new job with its first event, as `queued` or as `created`."""
    job.status = JobStatus.QUEUED if queued else JobStatus.CREATED
    job.last_sequence = 1
    if queued:
        job.queued_at = database_now()
    state = inspect(job)
    for name in state.unloaded - _SET_BY_INSERT:
        setattr(job, name, None)
    session.add(job)
    session.flush()
    if queued:
        # One statement, one time; reading the whole row again would cost as much as writing it.
        set_committed_value(job, "queued_at", job.created_at)
    payload = {"from": None, "to": job.status, "reason": None}
    session.add(Event(job_id=job.id, sequence=1, type=STATUS_CHANGED, payload=payload))
    session.flush()
    return job
