"""Jobs: plan, create, look, list, move, delete."""

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Annotated, Final

from fastapi import Header, Query, Request, Response
from sqlalchemy.orm import Session

from api.auth import requires
from api.creation import CREATION_PROBLEMS, IdempotencyKey, create_once, once
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.job_reads import JobReads
from api.pagination import Cursor, Limit, NameFilter, parameter_fault, printable_filter
from api.presentation import present_job
from api.routing import ServiceRouter
from api.schemas.fields import Moment
from api.schemas.jobs import JobCreate, JobPage, JobRead, PlanRead
from api.standing import Standing
from api.submission import consider
from api.waiting import wait_for_change
from grit_core.config.devices import normalize_device
from store import jobs
from store.database import run_in_transaction, transaction
from store.jobs import JobFilters, NewJob
from store.keys import Scope
from store.models import Job, JobStatus

router = ServiceRouter("jobs")

Move = Callable[..., Job]
_CONSIDERED: Final = ("dataset_not_ready", "model_not_ready", "request_invalid")


@router.post("/jobs/plan", responses=problems(*_CONSIDERED))
@requires(Scope.READ)
async def plan_job(body: JobCreate, caller: CallerDep, services: ServicesDep) -> PlanRead:
    """Say exactly what a job would do, and create nothing."""
    found = await consider(services, caller.team, body)
    resolved = found.resolved
    plan = resolved.plan.to_json()
    return PlanRead.model_validate({
        **{name: plan[name] for name in PlanRead.model_fields if name in plan},
        "model": found.model.id,
        "config": resolved.config_json(),
        "training": resolved.training_json(),
        "device": found.device.choice.device,
        "device_reason": found.device.reason,
        "estimate": resolved.estimate_json(),
    })


@router.post(
    "/jobs",
    status_code=201,
    response_model=JobRead,
    responses=problems(
        *_CONSIDERED,
        "plan_changed",
        *CREATION_PROBLEMS,
    ),
)
@requires(Scope.WRITE)
async def create_job(
    request: Request,
    response: Response,
    body: JobCreate,
    caller: CallerDep,
    services: ServicesDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Create a job; it is queued at once unless `auto_start` is false."""

    async def resolve() -> NewJob:
        found = await consider(services, caller.team, body)
        return found.new_job(max_attempts=services.settings.max_attempts)

    mark = once("POST /jobs", key=idempotency_key, content=await request.json())
    job = await create_once(services, caller, response, mark, resolve)
    # As it is: FastAPI would validate our own answer once more.
    return Response(
        job.model_dump_json(),
        status_code=201,
        headers=dict(response.headers),
        media_type="application/json",
    )


@router.get(
    "/jobs", response_model=JobPage, responses=problems("cursor_invalid", "request_invalid")
)
@requires(Scope.READ)
def list_jobs(  # noqa: PLR0913, PLR0917 - each is a parameter of the query
    request: Request,
    caller: CallerDep,
    services: ServicesDep,
    status: Annotated[list[JobStatus], Query(default_factory=list, description="May be repeated.")],
    name: NameFilter = None,
    model: Annotated[
        str | None, Query(max_length=512, description="Only of this base model.")
    ] = None,
    device: Annotated[
        str | None, Query(max_length=32, description="Only on this device: `cuda`, `mps` or `cpu`.")
    ] = None,
    created_after: Annotated[
        Moment | None, Query(description="Only later ones; with a time zone.")
    ] = None,
    created_before: Annotated[
        Moment | None, Query(description="Only earlier ones; with a time zone.")
    ] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """List your team's jobs, newest first; also by `metadata[key]=value`."""
    filters = JobFilters(
        statuses=tuple(status),
        name=printable_filter(name, "name"),
        model=printable_filter(model, "model"),
        device=normalize_device(printable_filter(device, "device") or "") or None,
        created_after=_aware(created_after, "created_after"),
        created_before=_aware(created_before, "created_before"),
        metadata=_metadata(request),
    )
    with transaction(services.engine, read_only=True) as session:
        page = jobs.list_jobs(
            session, team=caller.team, filters=filters, cursor=cursor, limit=limit
        )
        shown = JobPage(data=[present_job(job) for job in page.rows], next=page.next)
    return Response(shown.model_dump_json(), media_type="application/json")


@router.get(
    "/jobs/{job_id}",
    response_model=JobRead,
    responses={
        304: {"description": "Nothing has changed"},
        **problems("not_found", "too_many_waiting"),
    },
)
@requires(Scope.READ)
async def read_job(
    request: Request,
    job_id: str,
    caller: CallerDep,
    wait: Annotated[
        int, Query(ge=0, le=60, description="Seconds to wait for a change (long-poll).")
    ] = 0,
    if_none_match: Annotated[str | None, Header(description="An `ETag` that you know.")] = None,
) -> Response:
    """Return a job with its live progress; with `wait`, as soon as something changes."""
    reads: JobReads = request.app.state.job_reads
    look = partial(reads.read, job_id, team=caller.team)
    return await wait_for_change(look, wait_seconds=wait, known=if_none_match)


@router.delete(
    "/jobs/{job_id}", status_code=204, responses=problems("not_found", "illegal_transition")
)
@requires(Scope.WRITE)
def delete_job(job_id: str, caller: CallerDep, services: ServicesDep) -> None:
    """Delete an ended job with its events and checkpoints; its adapter stays."""
    prefix = run_in_transaction(
        services.engine, lambda session: jobs.delete_job(session, job_id, team=caller.team)
    )
    services.objects.delete_prefix(prefix)


def _verb(name: str, move: Move, words: str) -> None:
    def endpoint(job_id: str, caller: CallerDep, services: ServicesDep) -> JobRead:
        def work(session: Session) -> tuple[JobRead, str | None]:
            standing = Standing(session, services)
            moved = move(session, job_id, team=caller.team)
            return standing.show(moved), standing.bell(moved)

        job, bell = run_in_transaction(services.engine, work)
        if bell is not None:
            services.doorbell.ring(bell)
        return job

    endpoint.__name__ = f"{name}_job"
    endpoint.__doc__ = words
    router.post(f"/jobs/{{job_id}}/{name}", responses=problems("not_found", "illegal_transition"))(
        requires(Scope.WRITE)(endpoint)
    )


_verb(
    "cancel", jobs.request_cancel, "Cancel a job: at once, or as soon as its attempt has stopped."
)
_verb(
    "pause",
    jobs.request_pause,
    "Pause a job: it saves a checkpoint and gives its device back. A compression saves none: when"
    " it is resumed, it begins anew.",
)
_verb("resume", jobs.resume_job, "Queue a paused job again; it goes on where it stopped.")
_verb("retry", jobs.retry_job, "Queue a failed or cancelled job again, with fresh attempts.")
_verb("start", jobs.start_job, "Queue a job that was created with `auto_start: false`.")


def _aware(value: datetime | None, name: str) -> datetime | None:
    if value is not None and value.tzinfo is None:
        raise parameter_fault(name, "has no time zone; write 2026-01-31T12:00:00Z")
    return value


def _metadata(request: Request) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            key = name.removeprefix("metadata[").removesuffix("]")
            if not key or key in found or not (key + value).isprintable():
                raise parameter_fault(name[:80], "must name a key once, in printable characters")
            found[key] = value
    return found
