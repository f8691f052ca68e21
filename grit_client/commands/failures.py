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
    UnknownName,
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
    (UnknownName, NOT_FOUND),
    (ServiceUnreachable, UNREACHABLE),
    (EmbeddedError, UNREACHABLE),
    (TimeoutError, UNREACHABLE),
    (GritClientError, REFUSED),
)


def report(
    error: Exception,
    *,
    console: "Console",
    home: "Home",
    as_json: bool,
    url: str | None,
    key_source: str | None,
) -> int | None:
    """Write an error to standard error and return its exit code; None when it is a bug of ours.

    Args:
        error: What ended a command.
        console: Standard error.
        home: Of the command.
        as_json: Whether it is written as JSON.
        url: The address that an option or a variable named; None where it is the home's.
        key_source: The option or variable that the key came from; None where it is the home's.
    """
    code = next((number for kind, number in _CODES if isinstance(error, kind)), None)
    if code is None:
        return None
    if as_json:
        sys.stderr.write(json.dumps(_document(error, code), indent=2, default=str) + "\n")
    else:
        # The terminal breaks long lines: an id that it breaks can still be copied whole.
        text = printable(f"error: {error}")
        console.print(text, style="red", markup=False, soft_wrap=True)
        for line in _advice(error, home, url, key_source):
            console.print(line, style="dim", markup=False, soft_wrap=True)
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


def _advice(error: Exception, home: "Home", url: str | None, key_source: str | None) -> list[str]:
    lines = []
    if isinstance(error, ServiceUnreachable) and url is None and home.read_url() is None:
        lines.append(f"No service was started in {home.folder}: it holds no file `url`.")
    if isinstance(error, Unauthorised) and error.problem.status == 401:
        lines.append(_key_advice(error, home, key_source))
    if isinstance(error, RequestRefused) and error.problem.document.get("report"):
        lines.append(f"Every bad row: grit datasets report {error.problem.document.get('dataset')}")
    if isinstance(error, ServiceUnavailable) and error.problem.request_id:
        lines.append(f"Request {error.problem.request_id}; the service's log knows more about it.")
    return lines


def _key_advice(error: Unauthorised, home: "Home", key_source: str | None) -> str:
    """Say where the key came from, or where one can come from."""
    if error.problem.code == "auth_missing":
        return (
            "Give a key with --key or GRIT_API_KEY; the embedded service's is in"
            f" {home.key_file}, and is sent to its own address only."
        )
    source = key_source or str(home.key_file)
    return f"This key came from {source}; `grit keys create NAME` makes another."
