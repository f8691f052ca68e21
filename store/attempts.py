"""Executions of jobs: claim, keep, finish, give back. Every write is fenced by the attempt."""

from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import (
    Update,
    and_,
    delete,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from store import events
from store.database_time import database_now, database_time_in
from store.device_binding import bound_columns
from store.dialects import upsert
from store.errors import LeaseLost
from store.ids import new_id
from store.lifecycle import ACTIVE, transition
from store.models import (
    Adapter,
    AdapterOrigin,
    Attempt,
    AttemptOutcome,
    Checkpoint,
    Job,
    JobKind,
    JobStatus,
)
from store.queue import AUTO_QUEUES, TRAINING_QUEUES, queues_served, serving_device
from store.retries import Failure, RetryPolicy, end_attempt, settle
from store.turns import IS_QUEUED, take_next
from store.workers import SEEN_WITHIN_SECONDS, live_queues

__all__ = [
    "Claim",
    "Failure",
    "NewAdapter",
    "Orders",
    "RetryPolicy",
    "claim_next",
    "complete",
    "fail",
    "forget_checkpoint",
    "hand_back",
    "heartbeat",
    "list_checkpoints",
    "queues_to_ring",
    "reap_expired",
    "save_checkpoint_pointer",
    "set_phase",
]

_BELLS_AT_ONCE: Final = 8
_ORIGINS: Final = {
    JobKind.TRAINING: AdapterOrigin.JOB,
    JobKind.COMPRESSION: AdapterOrigin.COMPRESSION,
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A job that this worker now executes; `attempt` is the fencing token of every later write."""

    job: Job
    attempt: int
    attempt_id: str
    checkpoint: Checkpoint | None
    """Where to go on (`step`, `prefix`); none: from the start."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What the users want of a running attempt."""

    cancel: bool
    pause: bool


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
    session: Session,
    *,
    queue: str,
    worker_id: str,
    lease_seconds: float,
    max_running_jobs: int | None = None,
    seen_within_seconds: float = SEEN_WITHIN_SECONDS,
) -> Claim | None:
    """Claim the next job for a device: the team's turn, then its highest priority, then age.

    A job that named a strategy is bound to the device here, and only if no worker of a device that
    the strategy prefers was seen within `seen_within_seconds`.

    The attempt is counted here, so that a job that kills its worker at once runs out of attempts.
    Metrics past the checkpoint are removed, so that nothing is counted twice. A team has at most
    `max_running_jobs` running on the queue, unless its own row says otherwise; none: no bound.

    Returns:
        None: If no job is ready that a worker of this device may claim.
    """
    live = live_queues(session, seen_within_seconds=seen_within_seconds)
    found = take_next(
        session,
        device=queue,
        queues=queues_served(queue, live),
        max_running_jobs=max_running_jobs,
    )
    if found is None:
        return None
    job = transition(
        session,
        found.id,
        to=JobStatus.RUNNING,
        reason=None,
        attempt=Job.attempt + 1,
        charged_attempts=Job.charged_attempts + 1,
        worker_id=worker_id,
        lease_expires_at=database_time_in(lease_seconds),
        not_before=null(),
        phase="starting",
        **bound_columns(found, queue),
    )
    checkpoint = _newest_checkpoint(session, job.id)
    resumed_from = checkpoint.step if checkpoint is not None else None
    events.truncate_after(session, job.id, step=resumed_from or 0)
    attempt = Attempt(
        id=new_id("att"),
        job_id=job.id,
        number=job.attempt,
        worker_id=worker_id,
        resumed_from_step=resumed_from,
    )
    session.add(attempt)
    session.flush()
    return Claim(job=job, attempt=job.attempt, attempt_id=attempt.id, checkpoint=checkpoint)


def heartbeat(
    session: Session, *, job_id: str, attempt: int, worker_id: str, lease_seconds: float
) -> Orders:
    """Extend the lease by the database's clock, and read what the users want.

    Raises:
        LeaseLost: If the attempt is no longer the current one; its process must stop.
    """
    status = session.scalars(
        _fenced(job_id, attempt)
        .where(Job.worker_id == worker_id)
        .values(lease_expires_at=database_time_in(lease_seconds))
        .returning(Job.status),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    if status is None:
        raise LeaseLost(job_id, attempt=attempt)
    return Orders(cancel=status == JobStatus.CANCELLING, pause=status == JobStatus.PAUSING)


def set_phase(session: Session, *, job_id: str, attempt: int, phase: str) -> None:
    """Say what the attempt is doing (`downloading`, `loading`, `training`, `saving`...).

    Raises:
        LeaseLost: If the attempt is no longer the current one.
    """
    changed = session.scalars(
        _fenced(job_id, attempt)
        .values(phase=phase, version=Job.version + 1, updated_at=database_now())
        .returning(Job.id),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    if changed is None:
        raise LeaseLost(job_id, attempt=attempt)


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
    columns = {
        "step": step,
        "prefix": prefix,
        "manifest_sha256": manifest_sha256,
        "size_bytes": size_bytes,
    }
    told = {"step": step, "size_bytes": size_bytes}
    events.append(session, job_id, "checkpoint_saved", told, attempt)
    upsert(session, Checkpoint, [{"job_id": job_id, "attempt": attempt, **columns}])
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.number == attempt)
        .values(last_step=step),
        execution_options={"synchronize_session": False},
    )
    return session.get_one(Checkpoint, (job_id, step), populate_existing=True)


def list_checkpoints(session: Session, job_id: str) -> list[Checkpoint]:
    """Return a job's stored checkpoints, the first step first."""
    return list(
        session.scalars(
            select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)
        )
    )


def forget_checkpoint(session: Session, *, job_id: str, attempt: int, step: int) -> str | None:
    """Remove a checkpoint's row, before its objects: superseded, or found to be corrupt.

    The newest row that remains is the one that the next claim resumes from.

    Returns:
        The prefix whose objects may now be deleted, or none if there was nothing to remove.

    Raises:
        LeaseLost: If the attempt is no longer the current one.
    """
    held = session.scalars(
        select(Job.id)
        .where(Job.id == job_id, Job.attempt == attempt, Job.status.in_(ACTIVE))
        .with_for_update()
    ).one_or_none()
    if held is None:
        raise LeaseLost(job_id, attempt=attempt)
    return session.scalars(
        delete(Checkpoint)
        .where(Checkpoint.job_id == job_id, Checkpoint.step == step)
        .returning(Checkpoint.prefix),
        execution_options={"synchronize_session": False},
    ).one_or_none()


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
    repeated = _completed_before(session, job_id, attempt, adapter)
    if repeated is not None:
        return repeated
    job = transition(
        session,
        job_id,
        to=JobStatus.SUCCEEDED,
        expected_attempt=attempt,
        result=events.finite({**result, "adapter": adapter.id}),
    )
    session.add(
        Adapter(
            id=adapter.id,
            team=job.team,
            job_id=job.id,
            origin=_ORIGINS[JobKind(job.kind)],
            parent_id=job.source_adapter_id,
            name=adapter.name if adapter.name is not None else job.name,
            model=job.model,
            prefix=adapter.prefix,
            sha256=adapter.sha256,
            size_bytes=adapter.size_bytes,
            trainable_parameters=adapter.trainable_parameters,
            details=adapter.details,
        )
    )
    end_attempt(session, job, AttemptOutcome.SUCCEEDED)
    return job


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
    job = _held(session, job_id, attempt)
    return settle(session, job, AttemptOutcome.FAILED, failure, policy or RetryPolicy())


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
    policy = policy or RetryPolicy()
    job = _held(session, job_id, attempt)
    uncharged = {"charged_attempts": Job.charged_attempts - 1}
    status = JobStatus(job.status)
    if status is JobStatus.CANCELLING:
        end_attempt(session, job, AttemptOutcome.CANCELLED)
        return transition(
            session,
            job_id,
            to=JobStatus.CANCELLED,
            expected_attempt=attempt,
            reason=job.status_reason,
        )
    if status is JobStatus.PAUSING:
        end_attempt(session, job, AttemptOutcome.PAUSED)
        return transition(
            session,
            job_id,
            to=JobStatus.PAUSED,
            expected_attempt=attempt,
            reason=job.status_reason,
            **uncharged,
        )
    if job.infra_failures >= policy.max_infra_failures:
        failure = Failure(
            code="interrupted_too_often",
            message=f"The job was interrupted {job.infra_failures + 1} times: {reason}",
            hint="Look at the workers, then retry the job.",
        )
        return settle(session, job, AttemptOutcome.HANDED_BACK, failure, policy)
    end_attempt(session, job, AttemptOutcome.HANDED_BACK)
    return transition(
        session,
        job_id,
        to=JobStatus.QUEUED,
        expected_attempt=attempt,
        reason=reason,
        infra_failures=Job.infra_failures + 1,
        not_before=null(),
        **uncharged,
    )


def reap_expired(
    session: Session, *, policy: RetryPolicy | None = None, limit: int = 100
) -> list[str]:
    """Take back the jobs whose lease has expired by the database's clock.

    Returns:
        The ids of the jobs that changed; the queued ones want a bell.
    """
    policy = policy or RetryPolicy()
    expired = session.scalars(
        select(Job)
        .where(Job.status.in_(ACTIVE), Job.lease_expires_at < database_now())
        .order_by(Job.lease_expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True),
        execution_options={"populate_existing": True},
    ).all()
    for job in expired:
        failure = Failure(
            code="worker_lost",
            message=f"The worker of attempt {job.attempt} stopped answering.",
            hint="It was killed, its machine went down, or it lost the database for too long.",
            retryable=True,
        )
        settle(session, job, AttemptOutcome.LOST, failure, policy)
    return [job.id for job in expired]


def queues_to_ring(
    session: Session,
    *,
    again_after_seconds: float,
    seen_within_seconds: float = SEEN_WITHIN_SECONDS,
) -> list[str]:
    """Return a device's queue for every ready row whose bell is due, and note that it rings now.

    Jobs of a strategy ring for the device that claims them now; for none while none is live.
    A few rows of each queue at a time: enough to wake the workers that are idle, and no flood. The
    others are due at the next call.
    """
    due = and_(
        IS_QUEUED,
        or_(Job.not_before.is_(None), Job.not_before <= database_now()),
        or_(
            Job.last_rung_at.is_(None),
            Job.last_rung_at <= database_time_in(-again_after_seconds),
        ),
    )
    # In the index's own order, so that a long queue is not read to its end. Which rows ring does
    # not matter: who hears a bell claims the job whose turn it is.
    in_turn = select(Job.id).where(due).order_by(Job.queued_at)
    bells = _bells(session, seen_within_seconds=seen_within_seconds)
    first = [
        job_id
        for queue in bells
        for job_id in session.scalars(in_turn.where(Job.queue == queue).limit(_BELLS_AT_ONCE))
    ]
    # Another process may ring for the same rows just now; whoever locks a row rings for it.
    held = select(Job.id).where(Job.id.in_(first), due).with_for_update(skip_locked=True)
    queues = session.scalars(
        update(Job)
        .where(Job.id.in_(session.scalars(held).all()))
        .values(last_rung_at=database_now())
        .returning(Job.queue),
        execution_options={"synchronize_session": False},
    ).all()
    return sorted(bells[queue] for queue in queues)


def _bells(session: Session, *, seen_within_seconds: float) -> dict[str, str]:
    """Return, for each queue, the device's queue whose bell is to ring for its jobs."""
    live = live_queues(session, seen_within_seconds=seen_within_seconds)
    # A job that names its device rings also while no worker is there to hear.
    served = {queue: serving_device(queue, live) for queue in AUTO_QUEUES}
    found = {queue: device for queue, device in served.items() if device is not None}
    return {**{queue: queue for queue in TRAINING_QUEUES}, **found}


def _newest_checkpoint(session: Session, job_id: str) -> Checkpoint | None:
    return session.scalars(
        select(Checkpoint)
        .where(Checkpoint.job_id == job_id)
        .order_by(Checkpoint.step.desc())
        .limit(1)
    ).one_or_none()


def _fenced(job_id: str, attempt: int) -> Update:
    return update(Job).where(Job.id == job_id, Job.attempt == attempt, Job.status.in_(ACTIVE))


def _held(session: Session, job_id: str, attempt: int) -> Job:
    """Return a job of which an attempt holds the lease, and keep others from moving it.

    Raises:
        LeaseLost: If the attempt is no longer the current one.
    """
    job = session.scalars(
        select(Job)
        .where(Job.id == job_id, Job.attempt == attempt, Job.status.in_(ACTIVE))
        .with_for_update(),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if job is None:
        raise LeaseLost(job_id, attempt=attempt)
    return job


def _completed_before(
    session: Session, job_id: str, attempt: int, adapter: NewAdapter
) -> Job | None:
    """Return the job if this very completion was committed and only its answer was lost."""
    return session.scalars(
        select(Job)
        .join(Adapter, Adapter.job_id == Job.id)
        .where(
            Job.id == job_id,
            Job.attempt == attempt,
            Job.status == JobStatus.SUCCEEDED,
            Adapter.id == adapter.id,
        )
    ).one_or_none()
