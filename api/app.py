"""The front door: `uvicorn api.app:create_app --factory`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from anyio import to_thread
from fastapi import FastAPI

from api import errors
from api.audit import AuditTrail
from api.auth import Doorkeeper
from api.documents import document
from api.embedded import write_key
from api.envelope import Envelope
from api.job_faults import JOB_PATHS, find_request_faults
from api.job_reads import JobReads
from api.logs import configure_logs
from api.measures import Measures
from api.openai import chat as openai_chat
from api.openai import files as openai_files
from api.openai import fine_tuning as openai_fine_tuning
from api.openai import models as openai_models
from api.openai.documents import PREFIX as OPENAI_PREFIX
from api.openai.documents import describe as describe_openai
from api.openai.errors import render as render_openai_error
from api.openai.hints import find_hint
from api.rates import Limiter
from api.routes import (
    adapters,
    audit,
    catalog,
    datasets,
    docs,
    infer,
    job_events,
    job_logs,
    job_results,
    jobs,
    keys,
    models,
    service,
    teams,
)
from api.services import Services, open_services
from store.settings import Settings
from store.startup import (
    check_tables_or_exit,
    load_settings_or_exit,
    refuse,
    report_unavailable_parts,
)

ROUTES = (
    jobs,
    job_events,
    job_logs,
    job_results,
    datasets,
    models,
    catalog,
    adapters,
    infer,
    openai_chat,
    openai_models,
    openai_files,
    openai_fine_tuning,
    keys,
    teams,
    audit,
    service,
    docs,
)
ERROR_FORMS = {OPENAI_PREFIX: render_openai_error}
"""Paths whose errors are no problem documents."""
_DESCRIPTION = "Fine-tunes vision-language models with GRIT: LoRA adapters trained with curvature."


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the service's app.

    Args:
        settings: How the deployment is wired. None: the environment says so, and what it says is
            checked first, as a process of its own should.

    Raises:
        SystemExit: If the environment, the database's tables or a folder cannot be used.
    """  # noqa: DOC502 - comes from `refuse`
    if settings is not None:
        return _create_app(settings, open_services(settings))
    settings = load_settings_or_exit("api")
    configure_logs(settings.secrets())
    try:
        services = open_services(settings)
    except (OSError, ValueError) as error:
        refuse("api", error)
    check_tables_or_exit("api", services.engine)
    report_unavailable_parts(services.objects, services.mailbox)
    return _create_app(settings, services)


def _create_app(settings: Settings, services: Services) -> FastAPI:
    configure_logs(settings.secrets())
    limiter = Limiter(settings)
    trail = AuditTrail(services.engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await to_thread.run_sync(write_key, services)
        yield
        await to_thread.run_sync(trail.close)
        await limiter.close()
        await services.close()

    app = FastAPI(
        title="GRIT service",
        version=version("grit-service"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    measures = Measures()
    app.state.services = services
    app.state.doorkeeper = Doorkeeper(services, limiter)
    app.state.measures = measures
    app.state.trail = trail
    app.state.job_reads = JobReads(services)
    for module in ROUTES:
        app.include_router(module.router)
    errors.install(
        app,
        forms=ERROR_FORMS,
        hints={OPENAI_PREFIX: find_hint},
        fault_finders=dict.fromkeys(JOB_PATHS, find_request_faults),
    )
    _document(app)
    app.add_middleware(
        Envelope,
        measures=measures,
        trail=trail,
        allowed_hosts=settings.allowed_hosts,
        forms=ERROR_FORMS,
        slow_body_seconds=settings.slow_body_seconds,
        root_path=settings.root_path,
    )
    return app


def _document(app: FastAPI) -> None:
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe_openai(document(app))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's own way to extend the document
