"""The heartbeat of an attempt: extends its lease, brings back orders, and fences itself.

The lease is extended by the database's clock; how long ago that last worked is measured here with a
monotonic clock from *before* the call, so that this worker always believes in its lease for a
shorter time than the database does.
"""

from __future__ import annotations

import threading
import time
from contextvars import copy_context
from typing import TYPE_CHECKING

import structlog

from store.errors import LeaseLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from store.attempts import Orders

FENCE_MARGIN = 0.25
"""Share of the lease that is left for the child to die before another worker may start."""
_log = structlog.get_logger(__name__)


class Heartbeat:
    """A thread that beats until it is stopped or the lease is lost."""

    def __init__(
        self,
        beat: Callable[[], Orders],
        *,
        interval_seconds: float,
        lease_seconds: float,
        on_orders: Callable[[Orders], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Prepare the thread.

        Args:
            beat: Extends the lease; raises `LeaseLost` when a newer attempt exists.
            interval_seconds: Time between beats.
            lease_seconds: How long one beat holds.
            on_orders: Called from the thread after every beat.
            on_lost: Called once, from the thread, with the reason; the child must die at once.
        """
        self._beat = beat
        self._interval_seconds = interval_seconds
        self._fence_seconds = lease_seconds * (1 - FENCE_MARGIN)
        self._on_orders = on_orders
        self._on_lost = on_lost
        self._last_contact = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._run,), name="heartbeat", daemon=True
        )  # the context carries the job and the attempt into the log lines

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Beat no more."""
        self._stop.set()
        self._thread.join(timeout=5)

    @property
    def expired(self) -> bool:
        """Whether the lease must be taken for lost because the database was silent for too long.

        A beat that hangs cannot notice this itself, so the supervising thread asks as well.
        """
        return time.monotonic() - self._last_contact > self._fence_seconds

    def _run(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            started = time.monotonic()
            try:
                orders = self._beat()
            except LeaseLost as error:
                self._on_lost(str(error))
                return
            except Exception as error:  # noqa: BLE001 - any driver's way to say that the database is away
                _log.warning("heartbeat_failed", error=str(error))
                if self.expired:
                    self._on_lost("The database was out of reach for longer than the lease.")
                    return
            else:
                self._last_contact = started
                self._on_orders(orders)
