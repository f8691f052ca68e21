"""The log of a job's attempts: what the training process wrote."""

from dataclasses import dataclass
from typing import Annotated, Any, Final

from fastapi import Query, Response
from fastapi.responses import PlainTextResponse

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.pagination import parameter_fault
from api.routing import ServiceRouter
from store import jobs
from store.attempt_logs import StoredLog, find_log, read_log
from store.database import transaction
from store.errors import NotFound, ObjectMissing
from store.keys import Scope
from store.models import AttemptOutcome
from store.objects import Objects

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
        "description": "`complete`; `running`: more comes, every few seconds; `partial`: its worker"
        " died, and this is what was stored until then; `none`: no attempt has begun, or nothing"
        " was stored.",
        "schema": {"type": "string", "enum": ["complete", "running", "partial", "none"]},
    },
    "X-Log-Bytes": {
        "description": "Size of what is stored of the log.",
        "schema": {"type": "integer"},
    },
    "X-Log-Next": {
        "description": "The `offset` that continues after this answer.",
        "schema": {"type": "integer"},
    },
}


@router.get(
    "/jobs/{job_id}/logs",
    response_class=PlainTextResponse,
    responses={
        200: {"description": "A part of the log, in whole lines.", "headers": _HEADERS},
        **problems("not_found", "request_invalid"),
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
        int | None, Query(ge=1, le=MAX_BYTES, description="At most so much of its end: 65536.")
    ] = None,
    offset: Annotated[
        int | None,
        Query(ge=0, le=2**53, description="Byte to begin at, in place of `tail_bytes`."),
    ] = None,
) -> Response:
    """Return what the training process of an attempt wrote: its end, or from an offset on.

    To follow a log, ask again with the `X-Log-Next` of the answer as `offset`.
    """
    if tail_bytes is not None and offset is not None:
        raise parameter_fault("offset", "does not go with `tail_bytes`; send one of them")
    with transaction(services.engine, read_only=True) as session:
        jobs.get_job(session, job_id, team=caller.team)
        executed = {row.number: row.outcome for row in jobs.list_attempts(session, job_id)}
    if attempt is not None and attempt not in executed:
        raise NotFound("attempt", str(attempt))
    number = attempt or max(executed, default=0)
    log = _Log(
        objects=services.objects,
        job_id=job_id,
        attempt=number,
        stored=find_log(services.objects, job_id, number),
        grows=executed.get(number) == AttemptOutcome.RUNNING,
    )
    start = 0 if offset is None else offset
    if offset is None:
        start, data = log.tail(tail_bytes or DEFAULT_BYTES)
    else:
        data = log.read(offset, MAX_BYTES)
    headers = {
        "X-Log-Attempt": str(number),
        STATE: log.state,
        "X-Log-Bytes": str(log.size_bytes),
        "X-Log-Next": str(start + len(data)),
    }
    return PlainTextResponse(data.decode("utf-8", "replace").encode(), headers=headers)


@dataclass(frozen=True, kw_only=True)
class _Log:
    """What is stored of an attempt's log, and whether it still grows."""

    objects: Objects
    job_id: str
    attempt: int
    stored: StoredLog | None
    grows: bool

    @property
    def size_bytes(self) -> int:
        """Bytes that are stored."""
        return 0 if self.stored is None else self.stored.size_bytes

    @property
    def state(self) -> str:
        """The word of the header."""
        if self.stored is not None and self.stored.is_whole:
            return "complete"
        if self.grows:
            return "running"
        return "none" if self.stored is None else "partial"

    def tail(self, bound_bytes: int) -> tuple[int, bytes]:
        """Return the last whole lines and where they begin."""
        start = max(0, self.size_bytes - bound_bytes)
        data = self.read(start, bound_bytes)
        if start > 0:
            # A torn line would begin in the middle of a word, or of a character.
            whole = data.partition(b"\n")[2] or data
            start, data = start + len(data) - len(whole), whole
        return start, data

    def read(self, start: int, length: int) -> bytes:
        """Return whole lines from a byte on; one that is longer than `length` in parts."""
        if start >= self.size_bytes:
            return b""
        try:
            data = read_log(self.objects, self.job_id, self.attempt, start=start, length=length)
        except ObjectMissing:  # the job was deleted meanwhile
            return b""
        if self.state != "running" and start + len(data) >= self.size_bytes:
            return data
        lines = data[: data.rfind(b"\n") + 1]
        return data if not lines and len(data) >= length else lines
