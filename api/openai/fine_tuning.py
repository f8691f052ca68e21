"""Fine-tuning jobs: `/jobs` in OpenAI's shape."""

from typing import Final

from fastapi import Request, Response
from sqlalchemy.orm import Session

from api.auth import requires
from api.creation import CREATION_PROBLEMS, IdempotencyKey, create_once, once
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.errors import InvalidRequest, Item
from api.links import link
from api.openai.fine_tuning_answers import (
    checkpoint_id,
    present_checkpoint,
    present_event,
    present_tuning,
    sequence_of,
)
from api.openai.fine_tuning_request import job_request_of, names_of
from api.openai.pages import MAX_ROWS, After, Rows, cursor_after, unknown_after
from api.openai.schemas.fine_tuning import (
    FineTuningCheckpointList,
    FineTuningEventList,
    FineTuningJob,
    FineTuningJobCreate,
    FineTuningJobList,
)
from api.pointers import pointing_into
from api.presentation import present_job
from api.routing import ServiceRouter
from api.schemas.jobs import JobCreate
from api.services import Services
from api.standing import Standing
from api.submission import consider
from store import attempts, events, jobs
from store.database import run_in_transaction, transaction
from store.errors import NotFound
from store.job_rows import JobRow
from store.jobs import JobFilters, NewJob
from store.keys import Scope
from store.models import Job, JobKind, JobStatus

router = ServiceRouter("openai")

_ROUTE: Final = "POST /v1/fine_tuning/jobs"
_PATH: Final = "/v1/fine_tuning/jobs/{fine_tuning_job_id}"


@router.post(
    "/v1/fine_tuning/jobs",
    response_model=FineTuningJob,
    responses=problems(
        "dataset_not_ready",
        "model_not_ready",
        "request_invalid",
        "plan_changed",
        *CREATION_PROBLEMS,
    ),
)
@requires(Scope.WRITE)
async def create_tuning(
    request: Request,
    response: Response,
    body: FineTuningJobCreate,
    caller: CallerDep,
    services: ServicesDep,
    idempotency_key: IdempotencyKey = None,
) -> FineTuningJob:
    """Create a job; fields of `POST /jobs` go into `grit` (`extra_body={"grit": {...}}`)."""

    async def resolve() -> NewJob:
        asked = await job_request_of(services, caller.team, body)
        found = await consider(services, caller.team, asked)
        return found.new_job(max_attempts=services.settings.max_attempts)

    content = await request.json()
    mark = once(_ROUTE, key=idempotency_key, content=content)
    with pointing_into(content, names_of(body), model=JobCreate):
        job = await create_once(services, caller, response, mark, resolve)
    response.headers["Location"] = link(f"/v1/fine_tuning/jobs/{job.id}")
    return present_tuning(job, num_tokens=None)


@router.get("/v1/fine_tuning/jobs", responses=problems("request_invalid"))
@requires(Scope.READ)
def list_tunings(
    request: Request,
    caller: CallerDep,
    services: ServicesDep,
    after: After = None,
    limit: Rows = 20,
) -> FineTuningJobList:
    """List your team's training jobs, newest first; also by `metadata[key]=value`."""
    filters = JobFilters(metadata=_metadata(request))
    cursor = cursor_after(after, kind="job")
    limit = min(limit, MAX_ROWS)
    found: list[JobRow] = []
    with transaction(services.engine, read_only=True) as session:
        # Compressions are jobs too, and none of OpenAI's: pages are read until one is full.
        while len(found) <= limit:
            page = jobs.list_jobs(
                session, team=caller.team, filters=filters, cursor=cursor, limit=limit + 1
            )
            found += [job for job in page.rows if job.kind == JobKind.TRAINING]
            cursor = page.next
            if cursor is None:
                break
        tokens = events.trained_tokens(session, [job.id for job in found])
        data = [
            present_tuning(present_job(job), num_tokens=tokens.get(job.id)) for job in found[:limit]
        ]
    return FineTuningJobList(data=data, has_more=len(found) > limit)


@router.get(_PATH, responses=problems("not_found"))
@requires(Scope.READ)
def read_tuning(fine_tuning_job_id: str, caller: CallerDep, services: ServicesDep) -> FineTuningJob:
    """Return a job as it stands."""
    with transaction(services.engine, read_only=True) as session:
        return _present(session, services, _training(session, caller.team, fine_tuning_job_id))


@router.post(f"{_PATH}/cancel", responses=problems("not_found", "illegal_transition"))
@requires(Scope.WRITE)
def cancel_tuning(
    fine_tuning_job_id: str, caller: CallerDep, services: ServicesDep
) -> FineTuningJob:
    """Cancel a job: at once, or as soon as its attempt has stopped."""

    def work(session: Session) -> FineTuningJob:
        job = _training(session, caller.team, fine_tuning_job_id)
        return _present(session, services, jobs.request_cancel(session, job.id, team=job.team))

    return run_in_transaction(services.engine, work)


@router.post(f"{_PATH}/pause", responses=problems("not_found", "illegal_transition"))
@requires(Scope.WRITE)
def pause_tuning(
    fine_tuning_job_id: str, caller: CallerDep, services: ServicesDep
) -> FineTuningJob:
    """Pause a job: it saves a checkpoint, gives its device back, and is `paused` then."""

    def work(session: Session) -> FineTuningJob:
        job = _training(session, caller.team, fine_tuning_job_id)
        return _present(session, services, jobs.request_pause(session, job.id, team=job.team))

    return run_in_transaction(services.engine, work)


@router.post(f"{_PATH}/resume", responses=problems("not_found", "illegal_transition"))
@requires(Scope.WRITE)
def resume_tuning(
    fine_tuning_job_id: str, caller: CallerDep, services: ServicesDep
) -> FineTuningJob:
    """Queue a paused job again, also one that was created with `auto_start: false`."""

    def work(session: Session) -> tuple[FineTuningJob, str | None]:
        job = _training(session, caller.team, fine_tuning_job_id)
        move = jobs.start_job if job.status == JobStatus.CREATED else jobs.resume_job
        moved = move(session, job.id, team=job.team)
        return _present(session, services, moved), Standing(session, services).bell(moved)

    shown, bell = run_in_transaction(services.engine, work)
    if bell is not None:
        services.doorbell.ring(bell)
    return shown


@router.get(f"{_PATH}/events", responses=problems("not_found", "request_invalid"))
@requires(Scope.READ)
def list_tuning_events(
    fine_tuning_job_id: str,
    caller: CallerDep,
    services: ServicesDep,
    after: After = None,
    limit: Rows = 20,
) -> FineTuningEventList:
    """List what happened to a job, newest first; `GET /jobs/{id}/events` streams it."""
    limit = min(limit, MAX_ROWS)
    with transaction(services.engine, read_only=True) as session:
        job = _training(session, caller.team, fine_tuning_job_id)
        below = job.last_sequence + 1
        if after is not None:
            known = sequence_of(after, job_id=job.id)
            if known is None:
                raise unknown_after(after, "the id of an event of this job")
            below = min(below, known)
        # The numbers have no gap, so the newest are those below the last one read.
        first = max(1, below - limit)
        rows = (
            events.read(session, job.id, after=first - 1, limit=below - first)
            if below > first
            else []
        )
        data = [present_event(row) for row in reversed(rows)]
    return FineTuningEventList(data=data, has_more=first > 1)


@router.get(f"{_PATH}/checkpoints", responses=problems("not_found", "request_invalid"))
@requires(Scope.READ)
def list_tuning_checkpoints(
    fine_tuning_job_id: str,
    caller: CallerDep,
    services: ServicesDep,
    after: After = None,
    limit: Rows = 10,
) -> FineTuningCheckpointList:
    """List a job's stored checkpoints, newest first."""
    limit = min(limit, MAX_ROWS)
    with transaction(services.engine, read_only=True) as session:
        job = _training(session, caller.team, fine_tuning_job_id)
        rows = attempts.list_checkpoints(session, job.id)[::-1]
        metrics = {row.step: row for row in events.read_metrics(session, job.id)} if rows else {}
    if after is not None:
        known = [checkpoint_id(row) for row in rows]
        if after not in known:
            raise unknown_after(after, "the id of a checkpoint of this job")
        rows = rows[known.index(after) + 1 :]
    data = [present_checkpoint(row, metrics.get(row.step)) for row in rows[:limit]]
    return FineTuningCheckpointList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(rows) > limit,
    )


def _training(session: Session, team: str, job_id: str) -> Job:
    """Return a team's training job.

    Raises:
        NotFound: If there is none; a compression is none of OpenAI's jobs.
    """
    job = jobs.get_job(session, job_id, team=team)
    if job.kind != JobKind.TRAINING:
        raise NotFound("job", job_id)
    return job


def _present(session: Session, services: Services, job: Job) -> FineTuningJob:
    tokens = events.trained_tokens(session, [job.id])
    return present_tuning(Standing(session, services).show(job), num_tokens=tokens.get(job.id))


def _metadata(request: Request) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        named = name.startswith("metadata[") and name.endswith("]")
        key = name.removeprefix("metadata[").removesuffix("]") if named else ""
        if name.startswith("metadata") and (not key or key in found):
            detail = "Filter by `metadata[key]=value`, each key once."
            raise InvalidRequest([
                Item(code="value_invalid", detail=detail, parameter="query.metadata")
            ])
        if named:
            found[key] = value
    return found
