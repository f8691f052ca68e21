"""A worker's row: that it is alive, and which queues it serves."""

from __future__ import annotations

import os
import platform
import socket
import threading
from typing import TYPE_CHECKING, Any

from store import workers
from store.database import run_in_transaction
from store.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session


class Presence:
    """The row of this process in the table of workers."""

    def __init__(
        self,
        engine: Engine,
        *,
        worker_id: str,
        queues: list[str],
        device: str,
        quarantine: Callable[[], str | None] = lambda: None,
        hidden: bool = False,
    ) -> None:
        """Prepare the row.

        Args:
            engine: Where it is written.
            worker_id: The id of this process.
            queues: What it serves.
            device: What it computes on.
            quarantine: Says why its device takes no jobs, if it takes none.
            hidden: There is no row before `show`.
        """
        self.worker_id = worker_id
        self.stopping = False
        self._quarantine = quarantine
        self._engine = engine
        self._queues = queues
        self._device = device
        self._hidden = hidden
        self._gone = False
        self._lock = threading.Lock()
        """Held while the row is written: no beat may bring back a row that was removed."""

    def beat(self) -> None:
        """Say that this worker is alive; the first time, and after it was forgotten, who it is."""
        with self._lock:
            if not (self._hidden or self._gone):
                run_in_transaction(self._engine, self._beat_or_register)

    def show(self) -> None:
        """Let the row be written, and write it."""
        self._hidden = False
        self.beat()

    def leave(self) -> None:
        """Say that this worker is gone, for good."""
        self._gone = True
        with self._lock:
            run_in_transaction(
                self._engine,
                lambda session: workers.remove_worker(session, self.worker_id),
                tries=1,
            )

    def _beat_or_register(self, session: Session) -> None:
        reason = self._quarantine()
        details = _details() if reason is None else {**_details(), "quarantine": reason}
        stopping = self.stopping or reason is not None
        try:
            workers.beat(session, self.worker_id, stopping=stopping, details=details)
        except NotFound:
            workers.register_worker(
                session,
                id=self.worker_id,
                hostname=socket.gethostname(),
                process_id=os.getpid(),
                queues=self._queues,
                device=self._device,
                details=details,
            )


def _details() -> dict[str, Any]:
    return {"platform": platform.platform(), "python": platform.python_version()}
