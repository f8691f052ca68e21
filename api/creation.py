"""Creating jobs: the idempotency key, the row that is its place in the queue, and the bell."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

from anyio import to_thread
from fastapi import Header, Response
from sqlalchemy.orm import Session

from api.errors import Item, Problem
from api.links import link
from api.schemas.jobs import JobRead
from api.services import Services
from api.standing import Standing
from store import jobs, replays
from store.database import run_in_transaction, transaction
from store.jobs import NewJob
from store.keys import Caller

_MAX_KEY: Final = 255

IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Any text of yours; the same key and body give the same job.",
        alias="Idempotency-Key",
    ),
]
CREATION_PROBLEMS: Final = (
    "idempotency_key_invalid",
    "idempotency_key_reused",
    "quota_exceeded",
    "storage_full",
)
"""What any creation of a job may answer."""


@dataclass(frozen=True, kw_only=True)
class Once:
    """By what a creation that is sent again is recognised."""

    route: str
    key: str | None
    digest: str


def once(route: str, *, key: str | None, content: Any) -> Once:
    """Return by what a creation is recognised; `content` is all that the request says.

    Raises:
        Problem: If the key is not usable.
    """
    if key is not None and not (0 < len(key) <= _MAX_KEY and key.isascii() and key.isprintable()):
        detail = f"Idempotency-Key has 1 to {_MAX_KEY} printable ASCII characters."
        item = Item(
            code="idempotency_key_invalid", detail=detail, parameter="header.idempotency-key"
        )
        raise Problem("idempotency_key_invalid", detail, errors=[item])
    if key is None:
        return Once(route=route, key=None, digest="")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return Once(route=route, key=key, digest=hashlib.sha256(text.encode()).hexdigest())


async def create_once(
    services: Services,
    caller: Caller,
    response: Response,
    mark: Once,
    resolve: Callable[[], Awaitable[NewJob]],
) -> JobRead:
    """Create a job, or answer with the one that its idempotency key led to before.

    Args:
        services: The deployment.
        caller: Whose job it is.
        response: Gets `Location`, and `Idempotent-Replayed` where it applies.
        mark: By what a repetition is recognised.
        resolve: Looks at the request and returns the job's columns, or raises what is wrong.
    """
    if mark.key is not None:
        known = await to_thread.run_sync(_replayed, services, caller, mark)
        if known is not None:
            return _told(response, known, replayed=True)
    spec = await resolve()

    def insert(session: Session) -> tuple[JobRead, bool, str | None]:
        job, replayed = jobs.create_job(
            session,
            team=caller.team,
            spec=spec,
            idempotency_key=mark.key,
            request_hash=None if mark.key is None else mark.digest,
            route=mark.route,
            max_open_jobs=services.settings.max_open_jobs,
            max_stored_bytes=services.settings.max_stored_bytes,
        )
        standing = Standing(session, services)
        return standing.show(job), replayed, standing.bell(job)

    def create() -> tuple[JobRead, bool]:
        job, replayed, bell = run_in_transaction(services.engine, insert)
        if bell is not None and not replayed:
            # After the commit, and it never fails: the row is the queue.
            services.doorbell.ring(bell)
        return job, replayed

    job, replayed = await to_thread.run_sync(create)
    return _told(response, job, replayed=replayed)


def _told(response: Response, job: JobRead, *, replayed: bool) -> JobRead:
    response.headers["Location"] = link(f"/jobs/{job.id}")
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return job


def _replayed(services: Services, caller: Caller, mark: Once) -> JobRead | None:
    with transaction(services.engine, read_only=True) as session:
        job = replays.find_replayed(
            session,
            team=caller.team,
            idempotency_key=mark.key or "",
            request_hash=mark.digest,
            route=mark.route,
        )
        return None if job is None else Standing(session, services).show(job)
