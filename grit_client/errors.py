"""Everything the client raises on purpose.

GritClientError
+-- ServiceUnreachable          nobody answers at the address, or not in time
|   +-- ServiceUnavailable      the service answers that it cannot work now (429, 5xx)
+-- RequestRefused              the service refused the request, with every fault
|   +-- InvalidRequest          400, 413, 415, 422: something in the request has to change
|   +-- Unauthorised            401, 403: no key, an unknown key, or a scope that is missing
|   +-- NotFound                404: no such thing for this team
|   +-- Conflict                409: the state of things does not allow it
+-- UnknownName                 no job, dataset, adapter or key has that name, or several have it
+-- InvalidInput                refused here, before anything was sent: a file, an image, an option
+-- JobFailed                   the job that was waited for did not succeed
+-- UnsafeArchive               a download that would write outside its folder
+-- EmbeddedError               the embedded service could not start or stop
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from grit_core.errors import Fault

_SYSTEM_NUMBERS: Final = re.compile(r"\[(?:Errno -?\d+|SSL: \w+)\] |\s*\(_ssl\.c:\d+\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A problem document (RFC 9457) as the service sent it."""

    status: int
    title: str
    detail: str = ""
    code: str = ""
    request_id: str | None = None
    faults: tuple[Fault, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    """The whole document; some problems carry more, such as the moves that are allowed."""

    @classmethod
    def from_document(cls, status: int, document: Mapping[str, Any]) -> "Problem":
        """Read a problem document; what is missing or malformed is left out."""
        errors = document.get("errors")
        found = errors if isinstance(errors, list) else []
        faults = [_fault_of(error) for error in found if isinstance(error, dict)]
        request_id = document.get("request_id")
        return cls(
            status=status,
            title=str(document.get("title") or f"HTTP {status}"),
            detail=str(document.get("detail") or ""),
            code=str(document.get("code") or ""),
            request_id=str(request_id) if request_id else None,
            faults=tuple(faults),
            document=document,
        )

    def __str__(self) -> str:
        """Say everything once: a sentence about the whole, and one line for each fault."""
        detail = self.detail or self.title
        if len(self.faults) == 1 and self.faults[0].detail == detail:
            return describe(self.faults[0])
        return "\n".join([detail, *(f"  {describe(fault)}" for fault in self.faults)])


def _fault_of(error: Mapping[str, Any]) -> Fault:
    # A fault outside of the body names a parameter; one of a dataset, a line.
    where = str(error.get("pointer") or error.get("parameter") or "")
    if error.get("line") is not None:
        where = f"line {error['line']} {where}".rstrip()
    return Fault(
        pointer=where,
        code=str(error.get("code", "")),
        detail=str(error.get("detail", "")),
        input=error.get("input"),
    )


def describe_network_error(error: Exception) -> str:
    """Return what a network error says, without the numbers that systems and TLS give it."""
    return _SYSTEM_NUMBERS.sub("", str(error)).rstrip(".") or type(error).__name__


def describe(fault: Fault) -> str:
    """Return one line: where, what, and the value when the sentence does not show it already.

    A sentence that begins with the field's name gets the field's whole path in its place.
    """
    value = "" if fault.input is None else str(fault.input)
    shown = f" (got {_short(fault.input)})" if value and value not in fault.detail else ""
    where, detail = dotted(fault.pointer), f"{fault.detail}{shown}"
    name = where.rpartition(".")[2].partition("[")[0]
    for begin in (f"`{name}` ", f"{name} is ", f"{name} has "):
        if name and detail.startswith(begin):
            return f"{where}{detail.removeprefix(begin.partition(' ')[0])}"
    return f"{where}: {detail}" if where else detail


def dotted(pointer: str) -> str:
    """Return a JSON pointer as people write a path: `training.lr` for `/training/lr`.

    A parameter loses the word for its place; a line of a file stays before the path.
    """
    line, slash, rest = pointer.partition("/")
    if not slash:
        return pointer.removeprefix("query.").removeprefix("path.").removeprefix("header.")
    steps = [step.replace("~1", "/").replace("~0", "~") for step in rest.split("/")]
    path = "".join(f"[{step}]" if step.isdecimal() else f".{step}" for step in steps)
    return f"{line}{path.removeprefix('.')}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class GritClientError(Exception):
    """Base of everything this client raises on purpose."""


class ServiceUnreachable(GritClientError):
    """Nobody answers at the address, or not in time."""


class RequestRefused(GritClientError):
    """The service refused the request; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class ServiceUnavailable(ServiceUnreachable, RequestRefused):
    """The service answered that it cannot do this now; `problem` says why."""


class InvalidRequest(RequestRefused):
    """Something in the request has to change; `problem.faults` names every fault."""


class Unauthorised(RequestRefused):
    """The key is missing or unknown, or lacks a scope."""


class NotFound(RequestRefused):
    """There is no such thing for this key's team."""


class Conflict(RequestRefused):
    """The state of things does not allow the request."""


class UnknownName(GritClientError, LookupError):
    """Nothing has the name that was given, or several things have it."""


class InvalidInput(GritClientError, ValueError):
    """Refused before anything was sent: a file, an image, an option; JSON comes with `faults`."""

    def __init__(self, message: str, *, faults: tuple[Fault, ...] = ()) -> None:
        super().__init__("\n".join([message, *(f"  {describe(fault)}" for fault in faults)]))
        self.message = message
        self.faults = faults


class JobFailed(GritClientError):
    """The job ended without an adapter; `job` is its last state."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        error = job.get("error") or {}
        reason = error.get("message") or job.get("status_reason") or "no reason was recorded"
        hint = f" {error['hint']}" if error.get("hint") else ""
        super().__init__(f"Job {job.get('id')} {job.get('status')}: {reason}{hint}")
        self.job = job


class UnsafeArchive(GritClientError):
    """The archive holds something that must not be unpacked."""


class EmbeddedError(GritClientError):
    """The embedded service could not start or stop."""


_BY_STATUS: dict[int, type[RequestRefused]] = {
    401: Unauthorised,
    403: Unauthorised,
    404: NotFound,
    409: Conflict,
    412: Conflict,
    429: ServiceUnavailable,
}


def refusal(problem: Problem) -> RequestRefused:
    """The error that belongs to a problem document's status."""
    if problem.status >= 500:
        return ServiceUnavailable(problem)
    return _BY_STATUS.get(problem.status, InvalidRequest)(problem)
