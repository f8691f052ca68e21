"""Who asks, and whether they may: bearer keys, a scope for every route, deny by default."""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, TypeVar

from anyio import to_thread
from fastapi import Request

from api.audit import is_audited, note
from api.errors import Problem
from api.rates import Limiter
from api.services import Services
from store.database import transaction
from store.keys import Caller, Scope, authenticate, record_use

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

PUBLIC: Final = "public"
"""The access of a route that asks for no key; only `allow_anyone` sets it."""
_ACCESS: Final = "grit_access"
_CACHE_SECONDS: Final = 3.0
_CACHE_KEYS: Final = 1024


def requires(scope: Scope) -> Callable[[Endpoint], Endpoint]:
    """Give a route the scope that its callers need; a route without one is refused at start."""

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _ACCESS, scope)
        return endpoint

    return mark


def allow_anyone(endpoint: Endpoint) -> Endpoint:
    """Let a route be asked without a key."""
    setattr(endpoint, _ACCESS, PUBLIC)
    return endpoint


def access_of(endpoint: Callable[..., Any]) -> Scope | str:
    """Return what a route asks of its callers.

    Raises:
        LookupError: If nobody decided.
    """
    access: Scope | str | None = getattr(endpoint, _ACCESS, None)
    if access is None:
        name = getattr(endpoint, "__qualname__", repr(endpoint))
        raise LookupError(f"the route {name} has no access rule; add @requires or @allow_anyone")
    return access


class Doorkeeper:
    """Turns a request's key into its caller, and remembers keys for a few seconds.

    So a revoked key still works for at most `_CACHE_SECONDS`; in return a caller who polls costs
    the database one look-up in that time and not one for every request.
    """

    def __init__(self, services: Services, limiter: Limiter) -> None:
        self._services = services
        self._limiter = limiter
        self._known: OrderedDict[bytes, tuple[float, Caller]] = OrderedDict()
        self._lock = threading.Lock()

    async def admit(self, request: Request, access: Scope | str) -> Caller | None:
        """Return the caller of a request that may pass.

        Raises:
            Problem: If there is no key, it asks too often, or it lacks the scope.
        """
        if access == PUBLIC:
            return None
        token = _token_of(request)
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        caller = self._recall(digest)
        if caller is None:
            caller = await to_thread.run_sync(self._look_up, token)
            self._remember(digest, caller)
        # A key without the scope is counted too, and so cannot ask at will.
        submits = request.method == "POST" and access == Scope.WRITE
        await self._limiter.admit(caller, submits=submits)
        if Scope.ADMIN not in caller.scopes and access not in caller.scopes:
            note(request.scope, caller)
            have = ", ".join(sorted(caller.scopes)) or "none"
            raise Problem("scope_missing", f"This needs the scope {access!s}; the key has: {have}.")
        if is_audited(request.method, access):
            note(request.scope, caller)
        return caller

    def _look_up(self, token: str) -> Caller:
        # Reading takes no write lock; a key's use is noted at most once a minute.
        with transaction(self._services.engine, read_only=True) as session:
            caller = authenticate(session, token)
        if caller.use_is_old:
            with transaction(self._services.engine) as session:
                record_use(session, caller)
        return caller

    def _recall(self, digest: bytes) -> Caller | None:
        with self._lock:
            seen_at, caller = self._known.get(digest, (0.0, None))
        fresh = time.monotonic() - seen_at < _CACHE_SECONDS
        return caller if fresh else None

    def _remember(self, digest: bytes, caller: Caller) -> None:
        with self._lock:
            self._known[digest] = (time.monotonic(), caller)
            self._known.move_to_end(digest)
            while len(self._known) > _CACHE_KEYS:
                self._known.popitem(last=False)

    def forget(self) -> None:
        """Look every key up again, after one was revoked here."""
        with self._lock:
            self._known.clear()


def _token_of(request: Request) -> str:
    sent = request.headers.getlist("authorization")
    if not sent:
        raise Problem("auth_missing", "Send `Authorization: Bearer grit_...`.")
    scheme, _, token = sent[0].partition(" ")
    if len(sent) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise Problem("auth_missing", "The Authorization header must read `Bearer grit_...`.")
    return token.strip()[:512]
