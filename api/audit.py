"""The audit of this process: requests are noted at their end, and written by a thread of its own.

A submit neither waits for its row nor fails with it. Rows are written some at a time, a moment
later; while the database is away they wait here. What cannot be written at all is told in the
process's log, whole, so that it is not lost silently. A process that is killed takes along what it
noted in its last moments (about `_GATHER_SECONDS`); its access log has been written by then.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import structlog
from sqlalchemy import Engine
from starlette.types import Scope as Connection

from store import audit
from store.audit import Entry
from store.database import run_in_transaction
from store.errors import StoreError
from store.keys import Caller, Scope

log = structlog.get_logger(__name__)

_NOTED: Final = "grit.audit"
_CHANGING: Final = frozenset({Scope.WRITE, Scope.ADMIN})
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_MAX_WAITING: Final = 20_000
_MAX_BATCH: Final = 500
_GATHER_SECONDS: Final = 0.02
_IDLE_SECONDS: Final = 5.0
_AGAIN_SECONDS: Final = 1.0
_CLOSE_SECONDS: Final = 5.0
_MAX_ID: Final = 200


def is_audited(method: str, access: Scope | str) -> bool:
    """Tell whether a route is one that changes something, by the scope that it asks for."""
    return method not in _SAFE_METHODS and access in _CHANGING


def note(connection: Connection, caller: Caller) -> None:
    """Have the request written to the audit at its end."""
    connection[_NOTED] = caller


def entry_of(
    connection: Connection, *, status: int, request_id: str, location: str | None
) -> Entry | None:
    """Return the row of a request that has ended; none if it is not to have one."""
    caller: Caller | None = connection.get(_NOTED)
    if caller is None:
        return None
    path = getattr(connection.get("route"), "path", "unmatched")
    client = connection.get("client")
    return Entry(
        action=f"{connection['method']} {path}",
        status=status,
        team=caller.team,
        key_id=caller.key_id,
        object_id=_object_of(connection, location),
        request_id=request_id,
        client_address=None if client is None else _plain(str(client[0])),
    )


def _object_of(connection: Connection, location: str | None) -> str | None:
    """Return the ids in the path, and of what was made."""
    found = [_plain(str(value)) for value in connection.get("path_params", {}).values()]
    made = _plain((location or "").rpartition("/")[2])
    if made and made not in found:
        found.append(made)
    return " ".join(found) or None


def _plain(text: str) -> str:
    # PostgreSQL refuses NUL, and UTF-8 has no lone surrogates.
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_ID])


class AuditTrail:
    """Writes entries in the background. Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        """Prepare; the thread starts with the first entry, and ends when none comes for a while."""
        self._engine = engine
        self._waiting: deque[Entry] = deque()
        self._writing: list[Entry] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    def add(self, entry: Entry) -> None:
        """Have an entry written soon; never waits and never raises."""
        with self._changed:
            if len(self._waiting) >= _MAX_WAITING:
                _tell_lost([entry], "too many wait")
                return
            self._waiting.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, *, timeout_seconds: float = _CLOSE_SECONDS) -> bool:
        """Wait until all entries so far are written; false if they are not by then."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting and not self._writing, timeout_seconds
            )

    def close(self) -> None:
        """Write what waits; what cannot be written in a few seconds is told in the log."""
        written = self.flush()
        with self._changed:
            if not written:
                _tell_lost([*self._writing, *self._waiting], "the process ends")
                self._waiting.clear()
            self._closing = self._thread is not None
            self._changed.notify_all()

    def _run(self) -> None:
        while batch := self._next_batch():
            while not self._write(batch):
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, _AGAIN_SECONDS)
                    if self._closing:
                        break
            with self._changed:
                self._writing = []
                self._changed.notify_all()

    def _next_batch(self) -> list[Entry]:
        """Take what waits, a little after the first of it came; nothing when the thread may end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing, _IDLE_SECONDS)
            if not self._waiting:
                self._thread, self._closing = None, False
                return []
        time.sleep(_GATHER_SECONDS)
        with self._changed:
            size = min(len(self._waiting), _MAX_BATCH)
            self._writing = [self._waiting.popleft() for _ in range(size)]
            return self._writing

    def _write(self, batch: Sequence[Entry]) -> bool:
        """Write entries; true if they need not be tried again."""
        try:
            # An entry has an id, so that a commit without an answer may be repeated.
            run_in_transaction(self._engine, lambda session: audit.append(session, batch))
        except StoreError as error:
            log.warning("audit_waits", entries=len(batch), reason=str(error))
            return False
        except Exception as error:  # noqa: BLE001 - the thread must outlive it; it is told whole
            _tell_lost(batch, repr(error))
        return True


def _tell_lost(entries: Sequence[Entry], reason: str) -> None:
    for entry in entries:
        told = {name: value for name, value in vars(entry).items() if name != "seen_at"}
        log.error("audit_lost", reason=reason, **told)
