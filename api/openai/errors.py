"""Problems in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import re
from http import HTTPStatus
from typing import Any, Final

from fastapi.responses import JSONResponse

from api.errors import KINDS, Item, Problem, headers_of

_MAX_SHOWN: Final = 10
_CODES: Final = {
    "auth_missing": "invalid_api_key",
    "auth_invalid": "invalid_api_key",
    "rate_limited": "rate_limit_exceeded",
    "field_unknown": "unknown_parameter",
    "field_missing": "missing_required_parameter",
    "parameter_unsupported": "unsupported_parameter",
    "type_invalid": "invalid_type",
    "value_invalid": "invalid_value",
    "value_unknown": "invalid_value",
    "out_of_range": "invalid_value",
    "string_invalid": "invalid_value",
    "request_invalid": "invalid_value",
    "model_not_allowed": "model_not_found",
}
"""Our codes that OpenAI has another word for; the others stay as they are."""
_WORKER_CODES: Final = {"request_too_large": "context_length_exceeded"}
"""Likewise, of what the worker refuses: only that knows how many tokens a prompt has."""
_ITEM_DECIDES: Final = frozenset({"request_invalid", "inference_failed", "not_found"})
"""Kinds of problem whose first fault says more than the kind itself."""


def render(problem: Problem, request_id: str) -> JSONResponse:  # noqa: ARG001 - it is in the header
    """Return a problem as OpenAI's clients read it."""
    kind = KINDS[problem.code]
    headers = headers_of(problem)
    if kind.status == HTTPStatus.CONFLICT and "Retry-After" not in headers:
        # The official clients retry every 409; only one that passes by itself is worth it.
        headers["X-Should-Retry"] = "false"
    return JSONResponse(
        {"error": error_of(problem)}, status_code=status_of(problem.code), headers=headers
    )


def status_of(code: str) -> int:
    """Return the status of a kind of problem under `/v1`: OpenAI has no 422."""
    status = KINDS[code].status
    return (
        HTTPStatus.BAD_REQUEST.value if status == HTTPStatus.UNPROCESSABLE_ENTITY.value else status
    )


def error_of(problem: Problem) -> dict[str, Any]:
    """Return the `error` object of a problem."""
    first = problem.errors[0] if problem.errors else None
    by_item = first is not None and problem.code in _ITEM_DECIDES
    by_worker = problem.code == "inference_failed"
    code = first.code if first is not None and by_item else problem.code
    return {
        "message": _message(problem),
        "type": _type(KINDS[problem.code].status),
        "param": _param(problem),
        "code": _WORKER_CODES.get(code, code) if by_worker else code_of(code),
    }


def code_of(code: str) -> str:
    """Return OpenAI's word for a code of ours, or ours."""
    return _CODES.get(code, code)


def _message(problem: Problem) -> str:
    told = [_words(item) for item in problem.errors[:_MAX_SHOWN]]
    report = problem.extra.get("report")
    where = [f"The whole report: GET {report}."] if report else []
    if problem.code == "request_invalid" and told:
        head = [] if len(problem.errors) == 1 else [problem.detail]
    elif len(told) == 1 and problem.errors[0].detail == problem.detail:
        return problem.detail
    else:
        head = [problem.detail]
    more = len(problem.errors) - len(told)
    return " ".join([*head, *told, *([f"And {more} more."] if more else []), *where])


def _words(item: Item) -> str:
    return item.detail if item.line is None else f"Line {item.line}: {item.detail}"


def _type(status: int) -> str:
    if status == HTTPStatus.FORBIDDEN:
        return "permission_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def _param(problem: Problem) -> str | None:
    if problem.code == "dataset_rejected":
        return "file"
    for item in problem.errors[:1]:
        if item.pointer is not None:
            return dotted(item.pointer) or None
        if item.parameter is not None:
            return item.parameter.partition(".")[2] or item.parameter
    return None


def dotted(pointer: str) -> str:
    """Return a JSON pointer as OpenAI writes it: `/messages/0/content` is `messages[0].content`."""
    steps = [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]
    text = "".join(f"[{step}]" if re.fullmatch(r"\d+", step) else f".{step}" for step in steps)
    return text.removeprefix(".")
