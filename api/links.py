"""Paths of this service as its callers reach it: below the prefix of a proxy, if there is one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import Scope

HEADER: Final = "x-forwarded-prefix"
_PREFIX: Final = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]{1,64}){1,8}")
_current: ContextVar[str] = ContextVar("grit_path_prefix", default="")


def link(path: str) -> str:
    """Return a path of this service as the caller of this request reaches it."""
    return current_prefix() + path


def current_prefix() -> str:
    """Return the prefix under which the caller of this request reaches the service."""
    return _current.get()


@contextmanager
def below(prefix: str) -> Iterator[None]:
    """Make links under a prefix."""
    token = _current.set(prefix)
    try:
        yield
    finally:
        _current.reset(token)


def resolve_prefix(scope: Scope, *, configured: str) -> str:
    """Return the prefix under which a request's caller reaches the service; often empty.

    What the server and the deployment say counts more than what a proxy says for one request.

    Args:
        scope: Of the request.
        configured: The deployment's own.

    Raises:
        ValueError: If a proxy names something that is no path.
    """
    known = str(scope.get("root_path", "")).rstrip("/") or configured
    if known:
        return known
    sent = Headers(scope=scope).get(HEADER, "").strip().rstrip("/")
    if sent and not _PREFIX.fullmatch(sent):
        raise ValueError("X-Forwarded-Prefix is no path such as /grit; correct it in the proxy.")
    return sent


def under(prefix: str, scope: Scope) -> dict[str, Any]:
    """Return a request's scope under a prefix, whether or not a proxy has cut it off the path."""
    path = route_path({**scope, "root_path": scope.get("root_path") or prefix})
    # A server that puts its prefix before every path does so even where the proxy cut nothing off.
    path = route_path({"path": path, "root_path": prefix})
    return {**scope, "root_path": prefix, "path": prefix + path}


def route_path(scope: Scope) -> str:
    """Return the path of a request without the prefix: what routes are matched with."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    cut = path.removeprefix(prefix)
    return cut if cut.startswith("/") else path
