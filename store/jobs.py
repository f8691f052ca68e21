"""Jobs as their team sees them: create, read, list, and ask for a move."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from store.models import Job, JobStatus
from store.pages import Page


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """All that a job is made of; resolved by the API before it gets here."""

    model: str
    dataset_id: str
    request: dict[str, Any]
    config: dict[str, Any]
    training: dict[str, Any]
    plan: dict[str, Any]
    plan_hash: str
    device: str
    queue: str
    eval_dataset_id: str | None = None
    preset: str | None = None
    device_reason: str | None = None
    name: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    max_attempts: int = 3
    auto_start: bool = True


@dataclass(frozen=True, kw_only=True)
class JobFilters:
    """What a list of jobs may be narrowed by."""

    statuses: tuple[JobStatus, ...] = ()
    model: str | None = None
    device: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def create_job(
    session: Session,
    *,
    team: str,
    spec: NewJob,
    idempotency_key: str | None = None,
    request_hash: str | None = None,
    route: str = "POST /jobs",
    max_open_jobs: int | None = None,
) -> tuple[Job, bool]:
    """Create a job, `queued` or (without `auto_start`) `created`; its row is its place in the queue.

    With an idempotency key that this team used on this route before, the earlier job is returned and
    the second value is true. The database settles who is first.

    Raises:
        IdempotencyConflict: If the key was used with another request hash.
        QuotaExceeded: If the team has too many open jobs.
        NotFound: If the dataset is not this team's, or the model is not registered.
        ValueError: If an idempotency key comes without a request hash.
    """
    raise NotImplementedError


def get_job(session: Session, job_id: str, *, team: str) -> Job:
    """Return a team's job.

    Raises:
        NotFound: If there is none, or it is another team's.
    """
    raise NotImplementedError


def list_jobs(
    session: Session,
    *,
    team: str,
    filters: JobFilters | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[Job]:
    """Return a page of a team's jobs, newest first; stable while new jobs arrive.

    Raises:
        InvalidCursor: If the cursor is not one of ours.
    """
    raise NotImplementedError


def request_cancel(session: Session, job_id: str, *, team: str, reason: str | None = None) -> Job:
    """Cancel: at once where no attempt runs, else `cancelling` until the worker has stopped.

    Asking again changes nothing.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it has succeeded or failed.
    """
    raise NotImplementedError


def request_pause(session: Session, job_id: str, *, team: str, reason: str | None = None) -> Job:
    """Pause: at once while queued, else `pausing` until a checkpoint is saved. Idempotent.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it has not started or has ended.
    """
    raise NotImplementedError


def resume_job(session: Session, job_id: str, *, team: str) -> Job:
    """Queue a paused job again; it goes on from its last checkpoint. Idempotent.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it is not paused, queued or running.
    """
    raise NotImplementedError


def start_job(session: Session, job_id: str, *, team: str) -> Job:
    """Queue a job that was created with `auto_start: false`. Idempotent.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it is not created, queued or running.
    """
    raise NotImplementedError


def retry_job(session: Session, job_id: str, *, team: str) -> Job:
    """Queue a failed or cancelled job again with a fresh budget of attempts. Idempotent.

    It goes on from its last checkpoint, if there is one.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it is neither failed, cancelled, queued nor running.
    """
    raise NotImplementedError


def delete_job(session: Session, job_id: str, *, team: str) -> str:
    """Delete an ended job with its events and metrics; its adapter stays.

    Returns:
        The prefix of the job's objects (`jobs/<id>/`), for the caller to delete after the commit.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it has not ended.
    """
    raise NotImplementedError


def queue_position(session: Session, job: Job) -> int | None:
    """Return how many claims come before this queued job, plus one; none when it is not queued."""
    raise NotImplementedError


def list_attempts(session: Session, job_id: str) -> list[Any]:
    """Return a job's executions (`Attempt` rows), the first one first."""
    raise NotImplementedError


def count_by_status(session: Session) -> dict[tuple[str, str], int]:
    """Return the number of jobs per (queue, status) over all teams, for the service's metrics."""
    raise NotImplementedError
