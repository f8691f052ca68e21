"""Jobs as their team sees them: create, read, list, and ask for a move."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, func, null, select, type_coerce
from sqlalchemy.orm import Session

from store.database_time import database_now
from store.dialects import insert_unless_there
from store.errors import IdempotencyConflict, IllegalTransition, NotFound, QuotaExceeded
from store.ids import new_id
from store.job_rows import JobRow, select_rows
from store.lifecycle import ENDED, OPEN, TRANSITIONS, record_creation, transition
from store.models import (
    Adapter,
    Attempt,
    BaseModelRow,
    Dataset,
    IdempotencyKey,
    Job,
    JobKind,
    JobStatus,
    Team,
    UtcDateTime,
)
from store.pages import Page, read_page
from store.queue import AUTO_QUEUES, TRAINING_QUEUES
from store.quotas import hold_team, refuse_bytes
from store.turns import IS_QUEUED


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
    kind: JobKind = JobKind.TRAINING
    eval_dataset_id: str | None = None
    retention_dataset_id: str | None = None
    source_adapter_id: str | None = None
    """The adapter that a compression cuts."""
    preset: str | None = None
    device_reason: str | None = None
    device_options: dict[str, Any] | None = None
    """Of a job that named a strategy, as `store.device_binding` writes it; none: one device."""
    name: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    max_attempts: int = 3
    auto_start: bool = True


@dataclass(frozen=True, kw_only=True)
class JobFilters:
    """What a list of jobs may be narrowed by."""

    statuses: tuple[JobStatus, ...] = ()
    name: str | None = None
    model: str | None = None
    device: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def create_job(  # noqa: PLR0913 - what comes with a request, and two bounds
    session: Session,
    *,
    team: str,
    spec: NewJob,
    idempotency_key: str | None = None,
    request_hash: str | None = None,
    route: str = "POST /jobs",
    max_open_jobs: int | None = None,
    max_stored_bytes: int | None = None,
) -> tuple[Job, bool]:
    """Create a job: `queued`, or `created` without `auto_start`. Its row is its place in the queue.

    With an idempotency key that this team used on this route before, the earlier job is returned
    and the second value is true. The database settles who is first.

    Raises:
        IdempotencyConflict: If the key was used with another request hash.
        QuotaExceeded: If the team has too many open jobs, or no bytes left for their results.
        NotFound: If a dataset or the source adapter is not this team's, or the model is not
            registered.
        ValueError: If an idempotency key comes without a request hash.
    """
    if idempotency_key is not None and request_hash is None:
        raise ValueError("an idempotency key needs the hash of its request")
    job_id = new_id("job")
    if idempotency_key is not None and request_hash is not None:
        earlier = _claim_key(
            session,
            IdempotencyKey(
                team=team,
                route=route,
                key=idempotency_key,
                request_hash=request_hash,
                job_id=job_id,
            ),
        )
        if earlier is not None:
            return earlier, True
    owner = hold_team(session, team)
    _refuse_job(session, owner, default=max_open_jobs)
    refuse_bytes(session, owner, adding=0, default=max_stored_bytes)
    _check_references(session, team, spec)
    return _insert(session, job_id, team, spec), False


def get_job(session: Session, job_id: str, *, team: str) -> Job:
    """Return a team's job.

    Raises:
        NotFound: If there is none, or it is another team's.
    """
    job = session.scalars(
        select(Job).where(Job.id == job_id, Job.team == team),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if job is None:
        raise NotFound("job", job_id)
    return job


def list_jobs(
    session: Session,
    *,
    team: str,
    filters: JobFilters | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[JobRow]:
    """Return a page of a team's jobs, newest first; stable while new jobs arrive.

    Raises:
        InvalidCursor: If the cursor is not one of ours.
    """
    filters = filters or JobFilters()
    statement = select_rows(session).where(Job.team == team)
    if filters.statuses:
        statement = statement.where(Job.status.in_(filters.statuses))
    for column, value in (
        (Job.name, filters.name),
        (Job.model, filters.model),
        (Job.device, filters.device),
    ):
        if value is not None:
            statement = statement.where(column == value)
    if filters.created_after is not None:
        statement = statement.where(Job.created_at > filters.created_after)
    if filters.created_before is not None:
        statement = statement.where(Job.created_at < filters.created_before)
    for name, value in filters.metadata.items():
        statement = statement.where(_has_metadata(session, name, value))
    return read_page(session, statement, key=Job.id, cursor=cursor, limit=limit, make=JobRow._make)


def request_cancel(session: Session, job_id: str, *, team: str, reason: str | None = None) -> Job:
    """Cancel: at once where no attempt runs, else `cancelling` until the worker has stopped.

    Asking again changes nothing.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it has succeeded or failed.
    """
    job = _locked(session, job_id, team)
    if job.status in {JobStatus.CANCELLING, JobStatus.CANCELLED}:
        return job
    busy = job.status in {JobStatus.RUNNING, JobStatus.PAUSING}
    to = JobStatus.CANCELLING if busy else JobStatus.CANCELLED
    return transition(session, job_id, to=to, reason=reason or "cancelled by the user")


def request_pause(session: Session, job_id: str, *, team: str, reason: str | None = None) -> Job:
    """Pause: at once while queued, else `pausing` until a checkpoint is saved. Idempotent.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it has not started or has ended.
    """
    job = _locked(session, job_id, team)
    if job.status in {JobStatus.PAUSING, JobStatus.PAUSED}:
        return job
    to = JobStatus.PAUSED if job.status == JobStatus.QUEUED else JobStatus.PAUSING
    return transition(session, job_id, to=to, reason=reason or "paused by the user")


def resume_job(session: Session, job_id: str, *, team: str) -> Job:
    """Queue a paused job again; it goes on from its last checkpoint. Idempotent.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it is not paused, queued or running.
    """
    return _queue_again(
        session, job_id, team, when={JobStatus.PAUSED}, reason="resumed by the user"
    )


def start_job(session: Session, job_id: str, *, team: str) -> Job:
    """Queue a job that was created with `auto_start: false`. Idempotent.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it is not created, queued or running.
    """
    return _queue_again(
        session, job_id, team, when={JobStatus.CREATED}, reason="started by the user"
    )


def retry_job(session: Session, job_id: str, *, team: str) -> Job:
    """Queue a failed or cancelled job again with a fresh budget of attempts. Idempotent.

    It goes on from its last checkpoint, if there is one.

    Raises:
        NotFound: If the team has no such job, or the adapter that it was to compress is deleted.
        IllegalTransition: If it is neither failed, cancelled, queued nor running.
    """
    _hold_source(session, get_job(session, job_id, team=team))
    return _queue_again(
        session,
        job_id,
        team,
        when={JobStatus.FAILED, JobStatus.CANCELLED},
        reason="retried by the user",
        charged_attempts=0,
        infra_failures=0,
        error=null(),
        result=null(),
    )


def delete_job(session: Session, job_id: str, *, team: str) -> str:
    """Delete an ended job with its events and metrics; its adapter stays.

    Returns:
        The prefix of the job's objects (`jobs/<id>/`), for the caller to delete after the commit.

    Raises:
        NotFound: If the team has no such job.
        IllegalTransition: If it has not ended.
    """
    job = _locked(session, job_id, team)
    if job.status not in ENDED:
        raise IllegalTransition(
            job_id, status=job.status, to="deleted", allowed=TRANSITIONS[JobStatus(job.status)]
        )
    session.execute(
        delete(Job).where(Job.id == job_id), execution_options={"synchronize_session": False}
    )
    session.expunge(job)
    return f"jobs/{job_id}/"


def list_attempts(session: Session, job_id: str) -> list[Attempt]:
    """Return a job's executions (`Attempt` rows), the first one first."""
    return list(
        session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number))
    )


def count_waiting(session: Session, *, most: int) -> dict[str, int]:
    """Return the number of waiting jobs of every queue, counted no further than `most`."""
    counts = {
        queue: select(func.count())
        .select_from(select(Job.id).where(Job.queue == queue, IS_QUEUED).limit(most).subquery())
        .scalar_subquery()
        for queue in (*TRAINING_QUEUES, *AUTO_QUEUES)
    }
    found = session.execute(select(*counts.values())).one()
    return dict(zip(counts, found, strict=True))


def oldest_waits(session: Session) -> dict[str, float]:
    """Return for how many seconds the longest waiting job of each queue has waited."""
    firsts = {
        queue: select(Job.queued_at)
        .where(Job.queue == queue, IS_QUEUED)
        .order_by(Job.queued_at)
        .limit(1)
        .scalar_subquery()
        for queue in (*TRAINING_QUEUES, *AUTO_QUEUES)
    }
    now = type_coerce(database_now(), UtcDateTime())
    *since, at = session.execute(select(*firsts.values(), now)).one()
    return {
        queue: max(0.0, (at - first).total_seconds())
        for queue, first in zip(firsts, since, strict=True)
        if first is not None
    }


def count_by_status(
    session: Session, statuses: Collection[JobStatus] = tuple(JobStatus)
) -> dict[tuple[str, str], int]:
    """Return the number of jobs per (queue, status) over all teams, for the service's metrics.

    Counting reads as many entries of an index as there are such jobs.
    """
    rows = session.execute(
        select(Job.queue, Job.status, func.count())
        .where(Job.status.in_(statuses))
        .group_by(Job.queue, Job.status)
    )
    return {(queue, status): count for queue, status, count in rows}


def _claim_key(session: Session, wanted: IdempotencyKey) -> Job | None:
    """Take an idempotency key, or return the job of whoever took it first.

    Raises:
        IdempotencyConflict: If it was taken for another request.
    """
    columns = {
        "team": wanted.team,
        "route": wanted.route,
        "key": wanted.key,
        "request_hash": wanted.request_hash,
        "job_id": wanted.job_id,
    }
    # A concurrent holder of the key makes this statement wait until it commits or rolls back.
    if insert_unless_there(session, IdempotencyKey, columns):
        return None
    taken = session.get_one(IdempotencyKey, (wanted.team, wanted.route, wanted.key))
    if taken.request_hash != wanted.request_hash:
        raise IdempotencyConflict(wanted.key)
    return get_job(session, taken.job_id, team=wanted.team)


def _refuse_job(session: Session, owner: Team, *, default: int | None) -> None:
    bound = owner.max_open_jobs if owner.max_open_jobs is not None else default
    if bound is None:
        return
    count = session.scalars(
        select(func.count()).where(Job.team == owner.name, Job.status.in_(OPEN))
    ).one()
    if count >= bound:
        raise QuotaExceeded(owner.name, quota="open jobs", value=count, bound=bound)


def _check_references(session: Session, team: str, spec: NewJob) -> None:
    for dataset_id in (spec.dataset_id, spec.eval_dataset_id, spec.retention_dataset_id):
        if dataset_id is None:
            continue
        # Held until the commit, so that the dataset is not deleted between the check and the job.
        found = session.scalars(
            select(Dataset.id)
            .where(Dataset.id == dataset_id, Dataset.team == team)
            .with_for_update(read=True, key_share=True)
        ).one_or_none()
        if found is None:
            raise NotFound("dataset", dataset_id)
    if spec.source_adapter_id is not None:
        _hold_adapter(session, team, spec.source_adapter_id)
    known = (
        select(BaseModelRow.id)
        .where(BaseModelRow.id == spec.model)
        .with_for_update(read=True, key_share=True)  # as above
    )
    if session.scalars(known).one_or_none() is None:
        raise NotFound("model", spec.model)


def _hold_source(session: Session, job: Job) -> None:
    """Keep the source of an ended compression from being deleted until the commit.

    Raises:
        NotFound: If it is deleted already.
    """
    if job.kind != JobKind.COMPRESSION or job.status not in ENDED:
        return
    if job.source_adapter_id is None:
        raise NotFound("adapter", str(job.request.get("adapter")))
    _hold_adapter(session, job.team, job.source_adapter_id)


def _hold_adapter(session: Session, team: str, adapter_id: str) -> None:
    """Keep an adapter from being deleted until the commit.

    Raises:
        NotFound: If the team has no such adapter.
    """
    found = session.scalars(
        select(Adapter.id)
        .where(Adapter.id == adapter_id, Adapter.team == team)
        .with_for_update(read=True, key_share=True)
    ).one_or_none()
    if found is None:
        raise NotFound("adapter", adapter_id)


def _insert(session: Session, job_id: str, team: str, spec: NewJob) -> Job:
    columns = {
        field.name: getattr(spec, field.name)
        for field in fields(spec)
        if field.name not in {"metadata", "auto_start"}
    }
    job = Job(id=job_id, team=team, user_metadata=spec.metadata, **columns)
    return record_creation(session, job, queued=spec.auto_start)


def _locked(session: Session, job_id: str, team: str) -> Job:
    """Return a team's job and keep others from moving it until the caller's commit.

    Raises:
        NotFound: If the team has no such job.
    """
    job = session.scalars(
        select(Job).where(Job.id == job_id, Job.team == team).with_for_update(),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if job is None:
        raise NotFound("job", job_id)
    return job


def _queue_again(
    session: Session, job_id: str, team: str, *, when: set[JobStatus], reason: str, **columns: Any
) -> Job:
    job = _locked(session, job_id, team)
    if job.status in {JobStatus.QUEUED, JobStatus.RUNNING}:
        return job
    if job.status not in when:
        raise IllegalTransition(
            job_id,
            status=job.status,
            to=JobStatus.QUEUED,
            allowed=TRANSITIONS[JobStatus(job.status)] - {JobStatus.QUEUED},
        )
    return transition(
        session, job_id, to=JobStatus.QUEUED, reason=reason, not_before=null(), **columns
    )


def _has_metadata(session: Session, name: str, value: str) -> ColumnElement[bool]:
    if session.get_bind().dialect.name == "postgresql":
        return Job.user_metadata.op("->>")(name) == value
    entries = func.json_each(Job.user_metadata).table_valued("key", "value")
    return exists(select(entries.c.key).where(entries.c.key == name, entries.c.value == value))
