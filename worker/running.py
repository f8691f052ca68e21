"""The requests that a worker is answering: kept alive, and ended when nobody waits for them."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from worker.periodic import Periodic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from store.inference import Mailbox

LOOK_SECONDS: Final = 0.3
"""How often the mailbox is asked who went away, for all requests at once."""
_RENEWALS: Final = 4
"""Signs of life within the time after which a request counts as lost."""


class RunningRequest:
    """One request in progress; its flag is set by the thread that looks after all of them."""

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self.cancelled = False


class RunningRequests:
    """All requests in progress. One thread speaks for them, however many there are."""

    def __init__(self, mailbox: Mailbox, *, lost_seconds: float) -> None:
        """Prepare; `start` begins to look.

        Args:
            mailbox: Where the requests came from.
            lost_seconds: A request counts as lost after so long a silence.
        """
        self._mailbox = mailbox
        self._renew_seconds = lost_seconds / _RENEWALS
        self._renewed_at = time.monotonic()
        self._lock = threading.Lock()
        self._running: dict[str, RunningRequest] = {}
        self._watch = Periodic("running", self.look, interval_seconds=LOOK_SECONDS)

    def start(self) -> None:
        """Begin to look after the requests, in a thread."""
        self._watch.start()

    def stop(self) -> None:
        """End the thread."""
        self._watch.stop()

    def __len__(self) -> int:
        return len(self._running)

    def ids(self) -> list[str]:
        """Return the ids of the requests in progress."""
        with self._lock:
            return list(self._running)

    @contextmanager
    def one(self, request_id: str) -> Iterator[RunningRequest]:
        """Look after a request for as long as it is being answered."""
        running = RunningRequest(request_id)
        with self._lock:
            self._running[request_id] = running
        try:
            yield running
        finally:
            with self._lock:
                del self._running[request_id]

    def look(self) -> None:
        """Say that all requests are alive, when it is time, and mark those that were cancelled."""
        with self._lock:
            running = dict(self._running)
        if not running:
            return
        if time.monotonic() - self._renewed_at >= self._renew_seconds:
            # Before it happens: a broker that takes long to answer must not double the interval.
            self._renewed_at = time.monotonic()
            self._mailbox.renew(list(running))
        for request_id in self._mailbox.cancelled(list(running)):
            running[request_id].cancelled = True
