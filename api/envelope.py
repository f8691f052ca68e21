"""The outermost layer: request ids, security headers, the access log, and the last catch."""

import re
import secrets
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from http import HTTPStatus
from typing import Final

import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.audit import AuditTrail, entry_of
from api.content_encoding import decoded_body
from api.errors import Problem, Render, problem_of, respond
from api.links import below, resolve_prefix, route_path, under
from api.measures import Measures
from api.pace import PacedBody

log = structlog.get_logger("api.access")

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{8,64}")
_MAX_HEADERS: Final = 64
_MAX_HEADER_BYTES: Final = 16 * 1024
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
"""Of every answer that does not say otherwise."""


class Envelope:
    """Wraps the app: every answer has a request id and safe headers, every failure is a problem."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        measures: Measures,
        trail: AuditTrail,
        allowed_hosts: list[str],
        forms: Mapping[str, Render],
        slow_body_seconds: float,
        root_path: str = "",
    ) -> None:
        self.app = app
        self.root_path = root_path
        self.slow_body_seconds = slow_body_seconds
        self.measures = measures
        self.trail = trail
        self.forms = forms
        self.allowed_hosts = [host.lower() for host in allowed_hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, envelope: Envelope, scope: Scope, receive: Receive, send: Send) -> None:
        self.envelope = envelope
        self.method = str(scope["method"])
        # HEAD is answered as GET is, without the body.
        self.scope = {**scope, "method": "GET"} if self.method == "HEAD" else scope
        self.receive = receive
        self._send = send
        self.headers = Headers(scope=scope)
        self.request_id = self._request_id()
        self.status: int | None = None
        self.location: str | None = None
        self.started_at = time.perf_counter()
        self.scope["grit.request_id"] = self.request_id
        self._has_ended = False

    async def run(self) -> None:
        try:
            self._refuse_headers()
            prefix = self._prefix()
            if prefix:
                self.scope = under(prefix, self.scope)
            body = PacedBody(self.receive, seconds=self.envelope.slow_body_seconds)
            with below(prefix):
                await self.envelope.app(self.scope, decoded_body(self.scope, body), self.send)
        except ClientDisconnect:
            self.status = self.status or 499
        except Exception as error:  # noqa: BLE001 - the last catch; it is logged and answered
            await self._fail(error)
        finally:
            self._finish()

    async def send(self, message: Message) -> None:
        if self.method == "HEAD" and message["type"] == "http.response.body":
            await self._end_without_body(message)
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = (b"x-request-id", self.request_id.encode("ascii"))
            headers = [pair for pair in message["headers"] if pair[0].lower() != own[0]]
            present = {name.lower(): value for name, value in headers}
            location = present.get(b"location")
            self.location = None if location is None else location.decode("latin-1")
            message["headers"] = [
                *headers,
                own,
                *(pair for pair in _HEADERS if pair[0] not in present),
            ]
        await self._send(message)

    async def _end_without_body(self, message: Message) -> None:
        """End an answer to HEAD; whatever would make more of its body is stopped.

        Raises:
            ClientDisconnect: If there would be more.
        """
        if not self._has_ended:
            self._has_ended = True
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        if message.get("more_body"):
            raise ClientDisconnect

    def _request_id(self) -> str:
        sent = self.headers.get("x-request-id", "")
        return sent if _REQUEST_ID.fullmatch(sent) else f"req_{secrets.token_hex(12)}"

    def _refuse_headers(self) -> None:
        raw = self.scope["headers"]
        size = sum(len(name) + len(value) for name, value in raw)
        if len(raw) > _MAX_HEADERS or size > _MAX_HEADER_BYTES:
            raise Problem("headers_too_large", f"At most {_MAX_HEADERS} headers are read.")
        host = self.headers.get("host", "").rpartition(":")[0] or self.headers.get("host", "")
        hosts = self.envelope.allowed_hosts
        if hosts and not any(fnmatchcase(host.lower(), pattern) for pattern in hosts):
            raise Problem("bad_request", "This service does not answer to this Host.")

    def _prefix(self) -> str:
        try:
            return resolve_prefix(self.scope, configured=self.envelope.root_path)
        except ValueError as error:
            raise Problem("bad_request", str(error)) from None

    async def _fail(self, error: Exception) -> None:
        problem = problem_of(error)
        if problem.code == "internal_error":
            log.error(
                "request_broke", request_id=self.request_id, path=self._path(), exc_info=error
            )
        if self.status is not None:
            # The answer has begun: all that is left is to cut it short.
            raise error
        response = respond(
            problem,
            request_id=self.request_id,
            path=route_path(self.scope),
            forms=self.envelope.forms,
        )
        await response(self.scope, self.receive, self.send)

    def _finish(self) -> None:
        seconds = time.perf_counter() - self.started_at
        route = getattr(self.scope.get("route"), "path", "unmatched")
        status = self.status or 500
        self.envelope.measures.observe(
            method=self.method, route=route, status=status, seconds=seconds
        )
        if status == HTTPStatus.INSUFFICIENT_STORAGE:
            self.scope["app"].state.services.space.note_full()
        entry = entry_of(
            self.scope, status=status, request_id=self.request_id, location=self.location
        )
        if entry is not None:
            self.envelope.trail.add(entry)
        log.info(
            "request",
            request_id=self.request_id,
            method=self.method,
            path=self._path(),
            status=status,
            seconds=round(seconds, 4),
        )

    def _path(self) -> str:
        # Never the query: it is the caller's, and may hold what does not belong in a log.
        return str(self.scope["path"])[:200]
