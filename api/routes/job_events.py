"""The events of a job: a page of them, or a stream that replays and follows."""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from anyio import sleep, to_thread
from fastapi import Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.errors import InvalidRequest, Item
from api.presentation import present_event
from api.routing import ServiceRouter
from api.schemas.jobs import EventPage, EventRead
from api.services import Services
from api.waiting import PLACES, POLL_SECONDS, poll_limiter
from store import events, jobs
from store.database import transaction
from store.keys import Scope
from store.lifecycle import ENDED
from store.models import JobStatus

router = ServiceRouter("jobs")

HEARTBEAT_SECONDS: Final = 15.0
_BATCH: Final = 200
_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "A page; or, with `Accept: text/event-stream`, Server-Sent Events: `id` is"
        " the sequence number, `event` the type, `data` the event. The stream ends after the"
        " final event.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    204: {"description": "A stream after the final event: there is nothing left to follow."},
}


@router.get(
    "/jobs/{job_id}/events",
    response_model=EventPage,
    responses={**_STREAM, **problems("not_found", "too_many_waiting")},
)
@requires(Scope.READ)
async def read_events(
    request: Request,
    job_id: str,
    caller: CallerDep,
    services: ServicesDep,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Sequence number.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events of a page.")] = 100,
    last_event_id: Annotated[
        str | None, Header(description="Where a stream goes on; wins over `after`.")
    ] = None,
) -> Response:
    """Return a job's events: a page, or (`Accept: text/event-stream`) a stream."""
    streams = "text/event-stream" in request.headers.get("accept", "")
    if last_event_id is not None and streams:
        after = _sequence(last_event_id)

    def read() -> tuple[list[EventRead], bool]:
        return _read(services, caller.team, job_id, after, _BATCH if streams else limit)

    found, final = await to_thread.run_sync(read)
    if not streams:
        following = found[-1].sequence if len(found) == limit else None
        page = EventPage(data=found, next=following)
        return Response(page.model_dump_json(), media_type="application/json")
    if final and not found:
        return Response(status_code=204)
    follow = _follow(services, caller.team, job_id, after)
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    return StreamingResponse(follow, media_type="text/event-stream", headers=headers)


def _read(
    services: Services, team: str, job_id: str, after: int, limit: int
) -> tuple[list[EventRead], bool]:
    """Return some events, and whether they are all that there will ever be."""
    with transaction(services.engine, read_only=True) as session:
        job = jobs.get_job(session, job_id, team=team)
        # Read before the events: what ends a job is written together with its last event.
        ended = JobStatus(job.status) in ENDED
        found = [
            present_event(row) for row in events.read(session, job_id, after=after, limit=limit)
        ]
    return found, ended and len(found) < limit


async def _follow(services: Services, team: str, job_id: str, after: int) -> AsyncIterator[bytes]:
    with PLACES.one():
        yield b"retry: 2000\n\n"
        told_at = time.monotonic()
        while True:
            found, final = await to_thread.run_sync(
                _read, services, team, job_id, after, _BATCH, limiter=poll_limiter()
            )
            for event in found:
                yield _frame(event)
                after = event.sequence
                told_at = time.monotonic()
            if final:
                return
            if time.monotonic() - told_at > HEARTBEAT_SECONDS:
                yield b": heartbeat\n\n"
                told_at = time.monotonic()
            if len(found) < _BATCH:
                await sleep(POLL_SECONDS)


def _frame(event: EventRead) -> bytes:
    # One line of data: JSON escapes the line ends inside of texts.
    return (
        f"id: {event.sequence}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()
    )


def _sequence(text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= 10:
        return int(text)
    detail = "Last-Event-ID is the number of an event."
    item = Item(code="type_invalid", detail=detail, parameter="header.last-event-id", input=text)
    raise InvalidRequest([item])
