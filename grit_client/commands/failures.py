"""Errors, as a person and as a script read them."""

import json
import sys
from typing import TYPE_CHECKING, Any

from grit_client.errors import (
    EmbeddedError,
    GritClientError,
    InvalidInput,
    JobFailed,
    NotFound,
    RequestRefused,
    ServiceUnavailable,
    ServiceUnreachable,
    Unauthorised,
)
from grit_client.terminal_text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from grit_client.home import Home

JOB_FAILED, REFUSED, UNREACHABLE, UNAUTHORISED, NOT_FOUND = 1, 2, 3, 4, 5

_CODES: tuple[tuple[type[Exception], int], ...] = (
    (JobFailed, JOB_FAILED),
    (Unauthorised, UNAUTHORISED),
    (NotFound, NOT_FOUND),
    (ServiceUnreachable, UNREACHABLE),
    (EmbeddedError, UNREACHABLE),
    (TimeoutError, UNREACHABLE),
    (GritClientError, REFUSED),
)


def report(error: Exception, *, console: "Console", home: "Home", as_json: bool) -> int | None:
    """Write an error to standard error and return its exit code; None when it is a bug of ours."""
    code = next((number for kind, number in _CODES if isinstance(error, kind)), None)
    if code is None:
        return None
    if as_json:
        sys.stderr.write(json.dumps(_document(error, code), indent=2, default=str) + "\n")
    else:
        console.print(printable(f"error: {error}"), style="red", markup=False)
        for line in _advice(error, home):
            console.print(line, style="dim", markup=False)
    return code


def _document(error: Exception, code: int) -> dict[str, Any]:
    if isinstance(error, RequestRefused):
        return {"exit_code": code, **error.problem.document}
    faults = error.faults if isinstance(error, InvalidInput) else ()
    errors = [
        {"pointer": fault.pointer, "code": fault.code, "detail": fault.detail} for fault in faults
    ]
    kind = type(error).__name__
    return {"exit_code": code, "title": kind, "detail": str(error), "errors": errors}


def _advice(error: Exception, home: "Home") -> list[str]:
    lines = []
    if isinstance(error, Unauthorised) and error.problem.status == 401:
        lines.append(
            "The key comes from --key, from GRIT_API_KEY, or from"
            f" {home.key_file} (written by `grit up`)."
        )
    if isinstance(error, RequestRefused) and error.problem.document.get("report"):
        lines.append(f"Every bad row: grit datasets report {error.problem.document.get('dataset')}")
    if isinstance(error, ServiceUnavailable) and error.problem.request_id:
        lines.append(f"Request {error.problem.request_id}; the service's log knows more about it.")
    return lines
