"""Carries an attempt's events and phase to its row, in batches, beside its supervision."""

from __future__ import annotations

import threading
import time
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import structlog

from store.errors import LeaseLost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INTERVAL_SECONDS = 0.5
_log = structlog.get_logger(__name__)


class Reporter:
    """A thread that writes what was reported every half second, and at once what is urgent."""

    def __init__(
        self,
        write: Callable[[Sequence[dict[str, Any]], str | None], None],
        *,
        on_lost: Callable[[str], None],
    ) -> None:
        """Prepare the thread.

        Args:
            write: Writes events (as JSON) and the phase, if there is a new one, in one fenced
                transaction; raises `LeaseLost` when a newer attempt exists.
            on_lost: Called once when it does.
        """
        self._write = write
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._events: list[dict[str, Any]] = []
        self._phase: str | None = None
        self._urgent = False
        self._writing = False
        self._closed = False
        self._lost = False
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._run,), name="reporter", daemon=True
        )  # the context carries the job and the attempt into the log lines

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def report(self, event: dict[str, Any], *, urgent: bool = False) -> None:
        """Have an event written, in the order of the calls."""
        with self._changed:
            self._events.append(event)
            self._wake(urgent=urgent)

    def phase(self, name: str) -> None:
        """Have the job's phase written, at once."""
        with self._changed:
            self._phase = name
            self._wake(urgent=True)

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until all that was reported is written; False when it is not."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._wake(urgent=True)
            while self._pending and not self._lost:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._urgent = True
                self._changed.wait(min(remaining, INTERVAL_SECONDS))
            return not self._lost

    def close(self) -> None:
        """Stop; what is not written by now never will be."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5)

    @property
    def _pending(self) -> bool:
        return bool(self._events) or self._phase is not None or self._writing

    def _wake(self, *, urgent: bool) -> None:
        self._urgent = self._urgent or urgent
        if self._urgent:
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._urgent and not self._closed:
                    self._changed.wait(INTERVAL_SECONDS)
                if self._closed or self._lost:
                    return
                events, phase = self._events, self._phase
                self._events, self._phase = [], None
                self._urgent = False
                self._writing = bool(events) or phase is not None
            if self._writing:
                self._write_batch(events, phase)

    def _write_batch(self, events: list[dict[str, Any]], phase: str | None) -> None:
        written, lost = False, None
        try:
            self._write(events, phase)
            written = True
        except LeaseLost as error:
            lost = str(error)
        except Exception as error:  # noqa: BLE001 - kept for the next round, whatever the driver says
            _log.warning("report_delayed", events=len(events), error=str(error))
        with self._changed:
            if not written:
                self._events = events + self._events
                self._phase = self._phase or phase
            self._writing = False
            self._lost = lost is not None
            self._changed.notify_all()
        if lost is not None:
            self._on_lost(lost)
        elif not written:
            time.sleep(INTERVAL_SECONDS)
