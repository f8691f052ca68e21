"""What becomes of a job whose attempt did not succeed: another try after a wait, or the end."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from store.database_time import database_now, database_time_in
from store.lifecycle import transition
from store.models import Attempt, AttemptOutcome, Job, JobStatus
from store.settings import Settings

DETERMINISTIC_CODE: Final = "unexpected"
"""Of failures without a known cause: one that comes back word for word will come back again."""

RETRIED_ONCE: Final = frozenset({"out_of_memory_device", "out_of_memory_host"})
"""A lack of memory: it may have been that of another process, but hardly twice."""

_CHARGED: Final = (AttemptOutcome.FAILED, AttemptOutcome.LOST)

REPEATED_HINT: Final = (
    "It failed in the same way twice in a row, so it is not tried again. The attempt's log holds"
    " the details; please report them."
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an attempt failed, in words for the user."""

    code: str
    message: str
    category: str = "system"
    hint: str | None = None
    retryable: bool = False
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often, and after which wait, a job is tried again."""

    backoff_first_seconds: float = 10.0
    backoff_cap_seconds: float = 360.0
    max_infra_failures: int = 20

    @classmethod
    def of(cls, settings: Settings) -> "RetryPolicy":
        """Return this deployment's policy."""
        return cls(
            backoff_first_seconds=settings.backoff_first_seconds,
            backoff_cap_seconds=settings.backoff_cap_seconds,
            max_infra_failures=settings.max_infra_failures,
        )

    def backoff_seconds(self, failures: int) -> float:
        """Return the wait after so many failures: doubled for each, up to the cap."""
        return float(
            min(self.backoff_first_seconds * 2.0 ** min(failures - 1, 30), self.backoff_cap_seconds)
        )


def settle(
    session: Session, job: Job, outcome: AttemptOutcome, failure: Failure, policy: RetryPolicy
) -> Job:
    """End a held attempt that did not succeed, and decide what becomes of its job."""
    status = JobStatus(job.status)
    if _repeats(session, job, failure):
        failure = replace(failure, retryable=False, hint=REPEATED_HINT)
    elif failure.code in RETRIED_ONCE and _failed_before(session, job, failure.code):
        failure = replace(failure, retryable=False)
    again = failure.retryable and job.charged_attempts < job.max_attempts
    if status is JobStatus.CANCELLING:
        to, reason = JobStatus.CANCELLED, job.status_reason
        outcome = AttemptOutcome.CANCELLED
    elif again and status is JobStatus.PAUSING:
        to, reason = JobStatus.PAUSED, job.status_reason
    elif again:
        to, reason = JobStatus.QUEUED, f"attempt {job.attempt} failed: {failure.message}"
    else:
        to, reason = JobStatus.FAILED, failure.message
    end_attempt(session, job, outcome, failure)
    columns: dict[str, Any] = {}
    if to is JobStatus.QUEUED:
        wait_seconds = policy.backoff_seconds(job.charged_attempts)
        columns["not_before"] = database_time_in(wait_seconds)
    if to is JobStatus.FAILED:
        columns["error"] = _error(session, job.id, failure)
    return transition(
        session, job.id, to=to, expected_attempt=job.attempt, reason=reason, **columns
    )


def _repeats(session: Session, job: Job, failure: Failure) -> bool:
    """Tell whether the attempt before ended in the same unknown failure, at the same step."""
    if failure.code != DETERMINISTIC_CODE:
        return False
    before = session.execute(
        select(Attempt.failure, Attempt.last_step).where(
            Attempt.job_id == job.id, Attempt.number == job.attempt - 1
        )
    ).one_or_none()
    if before is None or before.failure is None:
        return False
    same = (before.failure["code"], before.failure["message"]) == (failure.code, failure.message)
    return same and before.last_step == (job.progress or {}).get("step")


def _failed_before(session: Session, job: Job, code: str) -> bool:
    """Tell whether an earlier attempt failed with this code since the user last retried the job."""
    earlier = session.scalars(
        select(Attempt.failure)
        .where(
            Attempt.job_id == job.id,
            Attempt.number < job.attempt,
            Attempt.outcome.in_(_CHARGED),
        )
        .order_by(Attempt.number.desc())
        .limit(job.charged_attempts - 1)  # without this one; a retry begins a fresh budget
    )
    return any(failure is not None and failure["code"] == code for failure in earlier)


def end_attempt(
    session: Session, job: Job, outcome: AttemptOutcome, failure: Failure | None = None
) -> None:
    """Record how the job's current attempt ended."""
    values: dict[str, Any] = {"outcome": outcome, "ended_at": database_now()}
    if failure is not None:
        values["failure"] = asdict(failure)
    if job.progress and "step" in job.progress:
        values["last_step"] = job.progress["step"]
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job.id, Attempt.number == job.attempt)
        .values(**values),
        execution_options={"synchronize_session": False},
    )


def _error(session: Session, job_id: str, failure: Failure) -> dict[str, Any]:
    """Return what the user reads of a failed job: the last failure, and that of every attempt.

    Its details stay with the attempt: they may be long, and jobs are read in lists.
    """
    rows = session.execute(
        select(Attempt.number, Attempt.outcome, Attempt.failure)
        .where(Attempt.job_id == job_id, Attempt.failure.is_not(None))
        .order_by(Attempt.number)
    )
    attempts = [
        {"attempt": number, "outcome": outcome, "code": told["code"], "message": told["message"]}
        for number, outcome, told in rows
        if told is not None
    ]
    return {**asdict(failure), "details": {}, "attempts": attempts}
