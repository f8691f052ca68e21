"""The process itself: whether it answers, whether its parts do, what it counts, what it is."""

import platform
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import structlog
from fastapi import Request, Response
from sqlalchemy import text

from api.auth import allow_anyone
from api.dependencies import ServicesDep
from api.documents import problems
from api.measures import MEDIA_TYPE, Measures
from api.routing import ServiceRouter
from api.schemas.catalog import Health, Readiness, Version
from api.services import Services
from store import jobs, workers
from store.database import transaction
from store.errors import StoreError
from store.lifecycle import ENDED, OPEN
from store.queue import INFERENCE_QUEUES
from store.tables import TablesOutdated, check_tables

router = ServiceRouter("service")
log = structlog.get_logger(__name__)


@router.get("/healthz")
@allow_anyone
async def read_health() -> Health:
    """Say that the process answers; nothing else is asked."""
    return Health(status="ok")


@router.get(
    "/readyz",
    responses={503: {"model": Readiness, "description": "A part does not answer"}},
)
@allow_anyone
def read_readiness(response: Response, services: ServicesDep) -> Readiness:
    """Say whether the database, the broker, the objects and some worker answer.

    Without a broker or a worker jobs are still accepted and wait, so these two do not make the
    service unready.
    """
    checks = {
        "database": _check(lambda: _check_database(services)),
        "objects": _check(services.objects.ping),
        "broker": _check(services.mailbox.ping),
        "workers": _check(lambda: _find_workers(services)),
    }
    ready = checks["database"] == "ok" and checks["objects"] == "ok"
    if not ready:
        response.status_code = 503
    return Readiness(status="ready" if ready else "unready", checks=checks)


def _check_database(services: Services) -> None:
    check_tables(services.engine)  # what it returns is a warning, which the start has logged


def _check(look: Callable[[], object]) -> str:
    try:
        found = look()
    except TablesOutdated as error:
        log.warning("not_ready", reason=str(error))
        return str(error)
    except (StoreError, OSError) as error:
        log.warning("not_ready", reason=str(error))
        return "does not answer"
    return found if isinstance(found, str) else "ok"


def _find_workers(services: Services) -> str:
    seconds = services.settings.worker_seen_seconds
    with transaction(services.engine, read_only=True) as session:
        live = workers.live_queues(session, seen_within_seconds=seconds)
    return "ok" if live else "none is live"


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
        live = workers.live_workers(
            session, seen_within_seconds=services.settings.worker_seen_seconds
        )
    data = measures.render(
        jobs=counts,
        workers=Counter(worker.device for worker in live),
        waiting=_count_waiting(services),
    )
    return Response(data, media_type=MEDIA_TYPE)


def _count_waiting(services: Services) -> dict[str, int]:
    """Count the inference requests that wait, by device; nothing while the broker is silent."""
    devices = [queue.removeprefix("infer.") for queue in INFERENCE_QUEUES]
    try:
        return {device: services.mailbox.num_waiting(device) for device in devices}
    except StoreError as error:
        log.warning("waiting_not_counted", reason=str(error))
        return {}


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
