"""The process itself: whether it answers, whether its parts do, what it counts, what it is."""

import platform
from collections import Counter
from dataclasses import asdict
from functools import partial
from importlib.metadata import version

import structlog
from fastapi import Request, Response
from sqlalchemy import text

from api.auth import allow_anyone
from api.dependencies import ServicesDep
from api.documents import problems
from api.measures import MEDIA_TYPE, Measures
from api.queues import QueueState, count_requests, read_queues, read_workers
from api.routing import ServiceRouter
from api.schemas.catalog import Health, QueueRead, Readiness, Version
from api.services import Services
from store import jobs
from store.database import transaction
from store.errors import StoreError
from store.lifecycle import ENDED, OPEN

router = ServiceRouter("service")
log = structlog.get_logger(__name__)


@router.get("/healthz")
@allow_anyone
async def read_health() -> Health:
    """Say that the process answers; nothing else is asked."""
    return Health(status="ok")


@router.get(
    "/readyz",
    responses={503: {"model": Readiness, "description": "A part does not answer, or is full"}},
)
@allow_anyone
def read_readiness(response: Response, services: ServicesDep) -> Readiness:
    """Say whether the parts answer and have room, and who serves training and inference.

    Without a broker or a worker jobs are still accepted and wait, and a deployment may be for
    training or for inference only: neither makes the service unready.
    """
    space = services.space.look()
    checks = {
        "database": services.looks["database"].check(),
        "objects": services.looks["objects"].check(),
        "storage": space.words,
        "broker": services.looks["broker"].check(),
    }
    queues = _queues(services) if checks["database"] == "ok" else None
    checks["training"] = _served(queues, "training", "no live worker trains: jobs wait")
    checks["inference"] = _served(queues, "inference", "no live worker answers requests")
    ready = checks["database"] == "ok" and checks["objects"] == "ok" and not space.is_full
    if not ready:
        response.status_code = 503
    return Readiness(
        status="ready" if ready else "unready",
        checks=checks,
        queues=[QueueRead.model_validate(asdict(each)) for each in queues or ()],
    )


def _queues(services: Services) -> list[QueueState] | None:
    """Return the queues; none while the database does not answer."""
    try:
        with transaction(services.engine, read_only=True) as session:
            return read_queues(session, services)
    except StoreError as error:
        log.warning("queues_not_read", reason=str(error))
        return None


def _served(queues: list[QueueState] | None, kind: str, otherwise: str) -> str:
    if queues is None:
        return "unknown while the database does not answer"
    return "ok" if any(each.workers for each in queues if each.kind == kind) else otherwise


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text", "content": {"text/plain": {}}},
        **problems("storage_unavailable"),
    },
)
@allow_anyone
def read_measures(request: Request, services: ServicesDep) -> Response:
    """Return the process's counters, and the jobs and workers as they stand.

    Jobs that have ended are counted once a minute.
    """
    measures: Measures = request.app.state.measures
    with transaction(services.engine, read_only=True) as session:
        counts = {
            **measures.ended_jobs(partial(jobs.count_by_status, session, ENDED)),
            **jobs.count_by_status(session, OPEN),
        }
        live = Counter(
            queue
            for each in read_workers(session, services)
            if not each.stopping
            for queue in each.queues
        )
        waits = jobs.oldest_waits(session)
    data = measures.render(
        jobs=counts, workers=live, waits=waits, requests=count_requests(services)
    )
    return Response(data, media_type=MEDIA_TYPE)


@router.get("/version")
@allow_anyone
def read_version(services: ServicesDep) -> Version:
    """Say what runs here."""
    revision = None
    try:
        with transaction(services.engine, read_only=True) as session:
            revision = session.scalar(text("SELECT version_num FROM alembic_version"))
    except StoreError:
        log.warning("no_schema_revision")
    return Version(
        name="grit-service",
        version=version("grit-service"),
        python=platform.python_version(),
        schema_revision=revision,
    )
