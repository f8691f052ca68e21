"""What goes wrong, as answers: one table from domain errors to statuses and codes, one shape.

The domain errors know nothing of HTTP (`grit_core.errors`, `store.errors`); this module is the
only place where they meet. A rejected value is echoed as `input` only when it is a short printable
scalar that does not look like a secret (`api.schemas.problems.safe_input`).
"""

import errno
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from api.links import route_path
from api.schemas.problems import PROBLEM_MEDIA_TYPE, problem_type, safe_input
from api.validation_texts import describe_error, known_fields
from grit_core import errors as core
from grit_core.config.bounds import MAX_HINTS
from grit_core.json_text import pointer_of, within
from store import errors as stored

log = structlog.get_logger(__name__)


MAX_ITEMS: Final = 100
"""Faults of one request that an answer tells."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem: its code, status and title, and when to come again."""

    code: str
    status: int
    title: str
    retry_after_seconds: int | None = None


def _kinds(*kinds: Kind) -> dict[str, Kind]:
    return {kind.code: kind for kind in kinds}


KINDS: Final[dict[str, Kind]] = _kinds(
    # the request itself
    Kind("bad_request", 400, "The request cannot be understood"),
    Kind("body_missing", 400, "The body is empty"),
    Kind("json_invalid", 400, "The body is not JSON"),
    Kind("json_too_deep", 400, "The body is nested too deep"),
    Kind("json_duplicate_key", 400, "A key appears twice"),
    Kind("number_not_finite", 400, "A number is not finite"),
    Kind("encoding_invalid", 400, "The text is not valid UTF-8"),
    Kind("upload_incomplete", 400, "The upload is incomplete"),
    Kind("idempotency_key_invalid", 400, "The idempotency key is not usable"),
    Kind("auth_missing", 401, "No API key was sent"),
    Kind("auth_invalid", 401, "The API key is not valid"),
    Kind("scope_missing", 403, "The API key lacks a scope"),
    Kind("not_found", 404, "Nothing of that name"),
    Kind("method_not_allowed", 405, "The method is not allowed here"),
    Kind("not_acceptable", 406, "No such representation"),
    Kind("request_timeout", 408, "The body comes too slowly"),
    Kind("body_too_large", 413, "The body is too large"),
    Kind("upload_too_large", 413, "The upload is too large"),
    Kind("unsupported_media_type", 415, "The media type is not supported"),
    Kind("format_not_allowed", 415, "The file format is not supported"),
    Kind("request_invalid", 422, "The request is not valid"),
    Kind("cursor_invalid", 422, "The cursor is not one of ours"),
    # the state of things
    Kind("illegal_transition", 409, "The job's status does not allow this"),
    Kind("idempotency_key_reused", 409, "The idempotency key was used for another body"),
    Kind("plan_changed", 409, "The plan has changed"),
    Kind("dataset_not_ready", 409, "The dataset is not ready"),
    Kind("adapter_not_ready", 409, "The adapter is not ready"),
    Kind("model_not_ready", 409, "The model is not ready", 5),
    Kind("model_conflict", 409, "The model id is taken"),
    Kind("key_ended", 409, "The key has ended"),
    Kind("still_referenced", 409, "Something else needs it"),
    Kind("object_missing", 410, "The stored object is gone"),
    # what was asked for
    Kind("dataset_rejected", 422, "The dataset has bad rows"),
    Kind("archive_unsafe_member", 422, "The archive holds an unsafe member"),
    Kind("archive_limits", 422, "The archive is beyond its limits"),
    Kind("dataset_invalid", 422, "The file is not a usable dataset"),
    Kind("empty_dataset", 422, "The dataset has no rows"),
    Kind("filename_invalid", 422, "The file name is not usable"),
    Kind("model_unavailable", 422, "The model is not available"),
    Kind("device_unavailable", 422, "The device is not available"),
    Kind("adapter_invalid", 422, "The adapter is not usable"),
    Kind("adapter_config_invalid", 422, "The adapter's settings are not usable"),
    Kind("adapter_mismatch", 422, "The adapter belongs to another model"),
    Kind("adapter_not_compressible", 422, "The adapter cannot be compressed"),
    Kind("inference_failed", 422, "The answer could not be generated"),
    # bounds and outages
    Kind("headers_too_large", 431, "The headers are too large"),
    Kind("rate_limited", 429, "Too many requests in a short time", 1),
    Kind("quota_exceeded", 429, "A quota of the team is reached", 30),
    Kind("too_many_waiting", 429, "Too many requests are waiting", 5),
    Kind("queue_full", 429, "The inference queue is full", 5),
    Kind("client_gone", 499, "The caller went away"),
    Kind("internal_error", 500, "Something broke on our side"),
    Kind("object_corrupt", 500, "A stored object is corrupt"),
    Kind("inference_broken", 500, "The inference worker failed"),
    Kind("queue_unavailable", 503, "The broker does not answer", 5),
    Kind("storage_unavailable", 503, "The storage does not answer", 5),
    Kind("no_inference_worker", 503, "No inference worker is live", 10),
    Kind("inference_timeout", 503, "No worker answered in time", 10),
    Kind("inference_worker_lost", 503, "The inference worker was lost", 2),
    Kind("out_of_memory_device", 503, "The device is out of memory", 10),
    Kind("out_of_memory_host", 503, "The machine is out of memory", 10),
    Kind("storage_full", 507, "No space is left"),
)

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

DOMAIN: Final[dict[type[Exception], str]] = {
    stored.NotFound: "not_found",
    stored.IllegalTransition: "illegal_transition",
    stored.IdempotencyConflict: "idempotency_key_reused",
    stored.InvalidKey: "auth_invalid",
    stored.KeyEnded: "key_ended",
    stored.QuotaExceeded: "quota_exceeded",
    stored.StillReferenced: "still_referenced",
    stored.InvalidCursor: "cursor_invalid",
    stored.ObjectMissing: "object_missing",
    stored.ObjectCorrupt: "object_corrupt",
    stored.QueueUnavailable: "queue_unavailable",
    stored.QueueFull: "queue_full",
    stored.StorageUnavailable: "storage_unavailable",
    stored.StorageFull: "storage_full",
    core.InvalidConfig: "request_invalid",
    core.InvalidDataset: "dataset_rejected",
    core.AdapterInvalid: "adapter_invalid",
    core.AdapterConfigInvalid: "adapter_config_invalid",
    core.AdapterMismatch: "adapter_mismatch",
    core.ModelUnavailable: "model_unavailable",
    core.DeviceUnavailable: "device_unavailable",
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One fault of a request, as `api.schemas.problems.ProblemItem` shows it."""

    code: str
    detail: str
    pointer: str | None = None
    parameter: str | None = None
    input: Any = None
    line: int | None = None
    image: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        values = {
            "pointer": self.pointer,
            "parameter": self.parameter,
            "code": self.code,
            "detail": self.detail,
            "input": safe_input(self.input),
            "line": self.line,
            "image": self.image,
        }
        return {key: value for key, value in values.items() if value is not None}


@dataclass(eq=False)
class Problem(Exception):
    """An answer that is an error."""

    code: str
    detail: str
    errors: Sequence[Item] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.detail)


_WIRE_CODES: Final = {
    "wrong_type": "type_invalid",
    "unknown_field": "field_unknown",
    "unknown_value": "value_unknown",
}


def item_of(fault: core.Fault) -> Item:
    """Return a domain fault as an item of a problem, under the code that the wire has for it."""
    code = _WIRE_CODES.get(fault.code, fault.code)
    return Item(code=code, detail=fault.detail, pointer=fault.pointer, input=fault.input)


class InvalidRequest(Problem):
    """The problem of a request with faults: all of them."""

    def __init__(self, errors: Sequence[Item]) -> None:
        alone = errors[0].detail if len(errors) == 1 else None
        detail = alone or f"The request has {len(errors)} faults."
        super().__init__("request_invalid", detail, errors=errors)


_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def problem_of(error: Exception) -> Problem:
    """Return the answer for a domain error, by the table; an unknown error is an internal one."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, OSError) and error.errno in _FULL:
        return Problem("storage_full", "The service has no space left for this; try again later.")
    for kind in type(error).__mro__:
        code = DOMAIN.get(kind)
        if code is not None:
            return _describe(error, code)
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return Problem("storage_full", "No space is left on the service's disk; try again later.")
    return Problem("internal_error", "The request failed for a reason that is ours; it is logged.")


def _describe(error: Exception, code: str) -> Problem:
    if isinstance(error, core.InvalidConfig):
        return InvalidRequest([item_of(fault) for fault in error.faults])
    if isinstance(error, stored.IllegalTransition):
        return Problem(code, str(error), extra={"allowed": list(error.allowed)})
    if isinstance(error, stored.InvalidKey):
        return Problem(code, "The API key is unknown, revoked or expired.")
    if KINDS[code].status >= 500 and code != "storage_full":
        # Paths and addresses of our own parts are nobody's business outside.
        return Problem(code, f"{KINDS[code].title}; try again later.")
    return Problem(code, str(error), headers=_patience(error))


def _patience(error: Exception) -> dict[str, str]:
    """Return the headers that say when to come again, where the kind of problem alone does not."""
    if isinstance(error, stored.QueueFull):
        return {"Retry-After": str(error.retry_after_seconds)}
    if isinstance(error, stored.QuotaExceeded) and error.quota == stored.STORED_BYTES:
        # No client is to wait for it: somebody has to delete something.
        return {"Retry-After": "3600", "X-Should-Retry": "false"}
    return {}


Render = Callable[[Problem, str], JSONResponse]
"""Renders a problem; the second argument is the request's id."""
Hint = Callable[[Request], str | None]
"""Says what a request to an unknown path is likely to be meant for, if it knows."""


def respond(
    problem: Problem, *, request_id: str, path: str, forms: Mapping[str, Render]
) -> JSONResponse:
    """Render a problem in the form of its path: of the first of `forms` whose prefix it has."""
    for prefix, render in forms.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return render(problem, request_id)
    return problem_document(problem, request_id)


def problem_document(problem: Problem, request_id: str) -> JSONResponse:
    """Render a problem document."""
    kind = KINDS[problem.code]
    content: dict[str, Any] = {
        "type": problem_type(kind.code),
        "title": kind.title,
        "status": kind.status,
        "detail": problem.detail,
        "code": kind.code,
        "request_id": request_id,
        "errors": [item.to_json() for item in problem.errors],
        **problem.extra,
    }
    return JSONResponse(
        content,
        status_code=kind.status,
        headers=headers_of(problem),
        media_type=PROBLEM_MEDIA_TYPE,
    )


def headers_of(problem: Problem) -> dict[str, str]:
    """Return the headers of a problem, whatever the form of its body."""
    kind = KINDS[problem.code]
    headers = dict(problem.headers)
    if kind.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="grit"'
    if kind.retry_after_seconds is not None:
        headers.setdefault("Retry-After", str(kind.retry_after_seconds))
    return headers


def request_id_of(request: Request) -> str:
    """Return the id that the envelope gave the request."""
    return str(request.scope.get("grit.request_id", ""))


FindFaults = Callable[[Request, Any, Sequence[Item]], Awaitable[Sequence[Item]]]
"""Returns all faults of a body whose shape is faulty, the ones that were found already included."""


def install(
    app: FastAPI,
    *,
    forms: Mapping[str, Render],
    hints: Mapping[str, Hint],
    fault_finders: Mapping[str, FindFaults],
) -> None:
    """Answer every error of an app: in one of the forms, or with a problem document.

    Args:
        app: The app.
        forms: The form of errors by the prefix of their paths.
        hints: What is said to a request for an unknown path, by the prefix whose form it gets.
        fault_finders: What else can be wrong with a body whose shape is faulty, by path.
    """

    def answer(request: Request, problem: Problem) -> JSONResponse:
        request_id = request_id_of(request)
        path = route_path(request.scope)
        return respond(problem, request_id=request_id, path=path, forms=forms)

    async def domain(request: Request, error: Exception) -> JSONResponse:
        problem = problem_of(error)
        if KINDS[problem.code].status >= 500:
            log.warning("request_failed", code=problem.code, reason=str(error))
        return answer(request, problem)

    async def validation(request: Request, error: Exception) -> JSONResponse:
        find = fault_finders.get(route_path(request.scope))
        return answer(request, await _problem_of_validation(request, error, find))

    async def http(request: Request, error: Exception) -> JSONResponse:
        problem = _problem_of_http(error)
        for prefix, hint in hints.items():
            if problem.code == "not_found" and (words := hint(request)) is not None:
                problem = replace(problem, detail=f"{problem.detail} {words}")
                return forms[prefix](problem, request_id_of(request))
        if problem.code == "method_not_allowed":
            problem = replace(problem, headers={"Allow": _methods_at(request)})
        return answer(request, problem)

    kinds: tuple[type[Exception], ...] = (Problem, *DOMAIN)
    for kind in kinds:
        app.add_exception_handler(kind, domain)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)


async def _problem_of_validation(
    request: Request, error: Exception, find: FindFaults | None
) -> Problem:
    errors, body = [], None
    if isinstance(error, RequestValidationError):
        errors, body = list(error.errors()), error.body
    field = getattr(getattr(request.scope.get("route"), "body_field", None), "field_info", None)
    annotation = getattr(field, "annotation", None)
    # A body of many small faults would become an answer of many times its size.
    brief = len(errors) > MAX_HINTS
    items: Sequence[Item] = [
        _within(body, _item_of_validation(each, annotation, brief=brief))
        for each in errors[:MAX_ITEMS]
    ]
    if find is not None:
        items = (await find(request, body, items))[:MAX_ITEMS]
    if len(errors) > MAX_ITEMS:
        detail = f"The request has {len(errors)} faults; the first {MAX_ITEMS} are listed."
        return Problem("request_invalid", detail, errors=list(items))
    return InvalidRequest(list(items))


def _methods_at(request: Request) -> str:
    """Return all methods of the request's path; the router names those of its first route alone."""
    found: set[str] = set()
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes):
            found |= {method, "HEAD"} if method == "GET" else {method}
    return ", ".join(sorted(found))


def _problem_of_http(error: Exception) -> Problem:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    by_status = {
        404: ("not_found", "There is nothing at this path; GET /docs shows those that there are."),
        405: ("method_not_allowed", "This path does not take this method; see the Allow header."),
        413: ("body_too_large", "The body is too large."),
        415: ("unsupported_media_type", "This media type is not read here."),
    }
    code, detail = by_status.get(status, ("bad_request", "The request cannot be understood."))
    return Problem(code, detail, headers=headers)


# --- pydantic's errors, as ours

_CODES: Final = {
    "missing": "field_missing",
    "extra_forbidden": "field_unknown",
    "enum": "value_unknown",
    "literal_error": "value_unknown",
    "string_pattern_mismatch": "string_invalid",
    "finite_number": "number_not_finite",
    "parameter_unsupported": "parameter_unsupported",
}
_RANGE: Final = re.compile(r"greater_than|less_than|too_short|too_long|multiple_of")
_TYPE: Final = re.compile(
    r"_type$|_parsing|_from_float|is_instance|int_|float_|bool_|datetime_|date_"
)


def items_of_validation(errors: Sequence[Mapping[str, Any]], body: Any = None) -> list[Item]:
    """Return the faults that pydantic found in a value of ours that stands for the body.

    Args:
        errors: Of the `ValidationError`.
        body: The type of the value, whose fields are named where a field is unknown.
    """
    brief = len(errors) > MAX_HINTS
    return [
        _item_of_validation({**each, "loc": ("body", *each["loc"])}, body, brief=brief)
        for each in errors
    ]


def _item_of_validation(error: Mapping[str, Any], body: Any = None, *, brief: bool = False) -> Item:
    place = tuple(error["loc"])
    kind = str(error["type"])
    code = _code_of(kind)
    in_body = bool(place) and place[0] == "body"
    shown = None if code in {"field_unknown", "field_missing"} else error.get("input")
    return Item(
        code=code,
        detail=describe_error(
            error, known=known_fields(body, place[1:-1]) if in_body else (), brief=brief
        ),
        input=shown,
        pointer=pointer_of(place[1:]) if in_body else None,
        parameter=None if in_body else ".".join(str(step) for step in place),
    )


def _within(body: Any, item: Item) -> Item:
    """Return a fault that points at nothing inside of a text: one may stand for a list."""
    if item.pointer is None or body is None:
        return item
    return replace(item, pointer=within(body, item.pointer))


def _code_of(kind: str) -> str:
    if kind in _CODES:
        return _CODES[kind]
    if _RANGE.search(kind):
        return "out_of_range"
    if _TYPE.search(kind):
        return "type_invalid"
    return "value_invalid"
