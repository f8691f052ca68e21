"""The life of a job: which status may follow which, and the one function that changes it."""

from typing import Any, Final

from sqlalchemy.orm import Session

from store.models import Job, JobStatus

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
    raise NotImplementedError
