"""Executions of jobs: claim, keep, finish, give back. Every write is fenced by the attempt."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from store.models import Checkpoint, Job
from store.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A job that this worker now executes; `attempt` is the fencing token of every later write."""

    job: Job
    attempt: int
    attempt_id: str
    checkpoint: Checkpoint | None
    """Where to go on (`step`, `prefix`); none: from the start."""
    lease_expires_at: datetime


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What the users want of a running attempt."""

    cancel: bool
    pause: bool


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


@dataclass(frozen=True, kw_only=True)
class NewAdapter:
    """What a finished attempt stored: complete objects under `prefix`."""

    id: str
    prefix: str
    sha256: str | None = None
    size_bytes: int | None = None
    trainable_parameters: int | None = None
    name: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


def claim_next(
    session: Session, *, queue: str, worker_id: str, lease_seconds: float
) -> Claim | None:
    """Claim the next job of a queue: by priority, then the team that waited longest, then age.

    The attempt is counted here, so that a job that kills its worker at once runs out of attempts.
    Metrics past the checkpoint are removed, so that nothing is counted twice.

    Returns:
        None: If no job of this queue is ready.
    """
    raise NotImplementedError


def heartbeat(
    session: Session, *, job_id: str, attempt: int, worker_id: str, lease_seconds: float
) -> Orders:
    """Extend the lease by the database's clock, and read what the users want.

    Raises:
        LeaseLost: If the attempt is no longer the current one; its process must stop.
    """
    raise NotImplementedError


def set_phase(session: Session, *, job_id: str, attempt: int, phase: str) -> None:
    """Say what the attempt is doing (`downloading`, `loading`, `training`, `saving`...).

    Raises:
        LeaseLost: If the attempt is no longer the current one.
    """
    raise NotImplementedError


def save_checkpoint_pointer(
    session: Session,
    *,
    job_id: str,
    attempt: int,
    step: int,
    prefix: str,
    manifest_sha256: str | None = None,
    size_bytes: int | None = None,
) -> Checkpoint:
    """Record a completely stored checkpoint as the place to resume from.

    Raises:
        LeaseLost: If the attempt is no longer the current one.
    """
    raise NotImplementedError


def list_checkpoints(session: Session, job_id: str) -> list[Checkpoint]:
    """Return a job's stored checkpoints, the first step first."""
    raise NotImplementedError


def forget_checkpoint(session: Session, *, job_id: str, attempt: int, step: int) -> str | None:
    """Remove an older checkpoint's row, before its objects; the current one is kept.

    Returns:
        The prefix whose objects may now be deleted, or none if there was nothing to remove.

    Raises:
        LeaseLost: If the attempt is no longer the current one.
    """
    raise NotImplementedError


def complete(
    session: Session,
    *,
    job_id: str,
    attempt: int,
    adapter: NewAdapter,
    result: dict[str, Any],
) -> Job:
    """Publish the adapter and mark the job `succeeded`, in one transaction.

    Raises:
        LeaseLost: If the attempt is no longer the current one.
        IllegalTransition: If the job is being cancelled: nothing is published; call `hand_back`.
    """
    raise NotImplementedError


def fail(
    session: Session,
    *,
    job_id: str,
    attempt: int,
    failure: Failure,
    policy: RetryPolicy | None = None,
) -> Job:
    """End an attempt that failed: the job is queued again with a wait, or `failed` for good.

    A job being cancelled becomes `cancelled`; one being paused and worth another try, `paused`.

    Raises:
        LeaseLost: If the attempt is no longer the current one.
    """
    raise NotImplementedError


def hand_back(
    session: Session,
    *,
    job_id: str,
    attempt: int,
    reason: str,
    policy: RetryPolicy | None = None,
) -> Job:
    """End an attempt that stopped as told, without charging the job's attempts.

    `pausing` becomes `paused`, `cancelling` becomes `cancelled`, and `running` (the worker drains)
    becomes `queued`; after too many of these the job fails all the same.

    Raises:
        LeaseLost: If the attempt is no longer the current one.
    """
    raise NotImplementedError


def reap_expired(
    session: Session, *, policy: RetryPolicy | None = None, limit: int = 100
) -> list[str]:
    """Take back the jobs whose lease has expired by the database's clock.

    Returns:
        The ids of the jobs that changed; the queued ones want a bell.
    """
    raise NotImplementedError


def queues_to_ring(session: Session, *, again_after_seconds: float) -> list[str]:
    """Return the queues with ready rows whose bell is due, and note that it rings now."""
    raise NotImplementedError
