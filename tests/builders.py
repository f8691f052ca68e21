"""Rows with nothing special about them, for tests that care about one thing."""

from typing import Any

from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from store import attempts, base_models, datasets, jobs, keys
from store.attempts import Claim, Failure, NewAdapter
from store.database import transaction
from store.database_time import database_time_in
from store.ids import new_id
from store.jobs import NewJob
from store.models import DatasetStatus, Job, JobStatus

TEAM = "tests"
MODEL = "org/tiny"


def prepare(session: Session, *, team: str = TEAM, model: str = MODEL) -> str:
    """Make a team, a ready base model and a ready dataset, and return the dataset's id."""
    keys.ensure_team(session, team)
    base_models.register(session, id=model, source=model)
    base_models.save_inventory(session, id=model, inventory={"layers": []}, inventory_hash="0")
    dataset = datasets.create_dataset(
        session, team=team, status=DatasetStatus.READY, num_rows=8, size_bytes=100
    )
    return dataset.id


def new_job(dataset_id: str, *, model: str = MODEL, **changes: Any) -> NewJob:
    """Return the description of a job for the CPU queue."""
    columns: dict[str, Any] = {
        "model": model,
        "dataset_id": dataset_id,
        "request": {"model": model},
        "config": {},
        "training": {"epochs": 1},
        "plan": {"layers": []},
        "plan_hash": "0",
        "device": "cpu",
        "queue": "cpu",
    }
    return NewJob(**(columns | changes))


def queued_job(engine: Engine, *, team: str = TEAM, **changes: Any) -> Job:
    """Make a job that waits for a worker, with all that it needs."""
    with transaction(engine) as session:
        spec = new_job(prepare(session, team=team), **changes)
        return jobs.create_job(session, team=team, spec=spec)[0]


def claim(
    engine: Engine, *, queue: str = "cpu", worker_id: str = "wrk_1", lease_seconds: float = 60.0
) -> Claim:
    """Claim the next job, which must be there."""
    with transaction(engine) as session:
        claimed = attempts.claim_next(
            session, queue=queue, worker_id=worker_id, lease_seconds=lease_seconds
        )
    assert claimed is not None, f"nothing to claim on {queue}"
    return claimed


def running_job(engine: Engine, **changes: Any) -> Job:
    """Make a job that a worker executes."""
    queued_job(engine, **changes)
    return claim(engine).job


def job_in(engine: Engine, status: JobStatus, **changes: Any) -> Job:
    """Make a job of any status, by the moves that lead there."""
    job = queued_job(engine, auto_start=status is not JobStatus.CREATED, **changes)
    if status in {JobStatus.CREATED, JobStatus.QUEUED}:
        return job
    with transaction(engine) as session:
        if status is JobStatus.PAUSED:
            return jobs.request_pause(session, job.id, team=job.team)
        if status is JobStatus.CANCELLED:
            return jobs.request_cancel(session, job.id, team=job.team)
    return _moved_on(engine, claim(engine, queue=job.queue), status)


def _moved_on(engine: Engine, claimed: Claim, status: JobStatus) -> Job:
    job = claimed.job
    with transaction(engine) as session:
        match status:
            case JobStatus.PAUSING:
                return jobs.request_pause(session, job.id, team=job.team)
            case JobStatus.CANCELLING:
                return jobs.request_cancel(session, job.id, team=job.team)
            case JobStatus.SUCCEEDED:
                return finish(session, claimed)
            case JobStatus.FAILED:
                failure = Failure(code="diverged", message="Not finite.", category="user")
                return attempts.fail(
                    session, job_id=job.id, attempt=claimed.attempt, failure=failure
                )
            case _:
                return job


def finish(session: Session, claimed: Claim) -> Job:
    """Complete a claimed job with an adapter."""
    adapter = new_id("adp")
    return attempts.complete(
        session,
        job_id=claimed.job.id,
        attempt=claimed.attempt,
        adapter=NewAdapter(id=adapter, prefix=f"adapters/{adapter}/", size_bytes=10),
        result={"final_loss": 0.5},
    )


def expire_lease(engine: Engine, job_id: str) -> None:
    """Let a lease end now, as if its worker had been silent."""
    with transaction(engine) as session:
        session.execute(
            update(Job).where(Job.id == job_id).values(lease_expires_at=database_time_in(-1.0))
        )


def end_wait(engine: Engine, job_id: str) -> None:
    """Let the wait before the next attempt end now."""
    with transaction(engine) as session:
        session.execute(
            update(Job).where(Job.id == job_id).values(not_before=database_time_in(-1.0))
        )
