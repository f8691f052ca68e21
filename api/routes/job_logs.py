"""The log of a job's attempts: what the training process wrote."""

from typing import Annotated, Any, Final

from fastapi import Query, Response
from fastapi.responses import PlainTextResponse

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.routing import ServiceRouter
from store import jobs
from store.database import transaction
from store.errors import NotFound, ObjectMissing
from store.keys import Scope
from store.models import AttemptOutcome
from store.objects import Objects
from store.orphans import log_key

router = ServiceRouter("jobs")

DEFAULT_BYTES: Final = 64 * 1024
MAX_BYTES: Final = 4 * 1024**2
STATE: Final = "X-Log-State"
_HEADERS: Final[dict[str, Any]] = {
    "X-Log-Attempt": {
        "description": "Number of the attempt; 0 where no attempt has begun.",
        "schema": {"type": "integer"},
    },
    STATE: {
        "description": "`complete`; `running`: it is stored when the attempt ends, and empty until"
        " then; `none`: no attempt has begun, or its worker died before it could store one.",
        "schema": {"type": "string", "enum": ["complete", "running", "none"]},
    },
    "X-Log-Bytes": {
        "description": "Size of the whole log; the answer holds its end.",
        "schema": {"type": "integer"},
    },
}


@router.get(
    "/jobs/{job_id}/logs",
    response_class=PlainTextResponse,
    responses={
        200: {"description": "The end of the log, in whole lines.", "headers": _HEADERS},
        **problems("not_found"),
    },
)
@requires(Scope.READ)
def read_logs(
    job_id: str,
    caller: CallerDep,
    services: ServicesDep,
    attempt: Annotated[
        int | None, Query(ge=1, le=2**31 - 1, description="Its number; by default the newest.")
    ] = None,
    tail_bytes: Annotated[
        int, Query(ge=1, le=MAX_BYTES, description="At most so much of its end.")
    ] = DEFAULT_BYTES,
) -> Response:
    """Return what the training process of an attempt wrote, or its end."""
    with transaction(services.engine, read_only=True) as session:
        jobs.get_job(session, job_id, team=caller.team)
        executed = {row.number: row.outcome for row in jobs.list_attempts(session, job_id)}
    if attempt is not None and attempt not in executed:
        raise NotFound("attempt", str(attempt))
    number = attempt or max(executed, default=0)
    text, size_bytes = _tail(services.objects, log_key(job_id, number), tail_bytes)
    if size_bytes is not None:
        state = "complete"
    else:
        state = "running" if executed.get(number) == AttemptOutcome.RUNNING else "none"
    headers = {"X-Log-Attempt": str(number), STATE: state, "X-Log-Bytes": str(size_bytes or 0)}
    return PlainTextResponse(text, headers=headers)


def _tail(objects: Objects, key: str, bound_bytes: int) -> tuple[bytes, int | None]:
    """Return the last whole lines of an object, and its size; none where there is no object."""
    try:
        size_bytes = objects.size_bytes(key)
        start = max(0, size_bytes - bound_bytes)
        data = objects.get_range(key, start=start, length=bound_bytes)
    except ObjectMissing:
        return b"", None
    if start > 0:
        # A torn line would begin in the middle of a word, or of a character.
        data = data.partition(b"\n")[2] or data
    return data.decode("utf-8", "replace").encode(), size_bytes
