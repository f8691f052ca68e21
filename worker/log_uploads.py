"""Takes the log of a running attempt to the object store, piece by piece as it grows.

The log is stored in chunks of one size: those that are full are written once, the last one again
whenever it has grown. When the attempt ends, the whole log takes their place.
"""

from __future__ import annotations

import threading
from contextvars import copy_context
from typing import TYPE_CHECKING, Final

import structlog

from store.attempt_logs import CHUNK_BYTES, chunk_key, delete_chunks
from store.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from store.objects import Objects

MAX_CHUNKS_AT_ONCE: Final = 64
"""Chunks of one round; a log that grows faster is behind for a while."""
_log = structlog.get_logger(__name__)


class LogUploads:
    """A thread that stores what a log has grown by, at most once an interval."""

    def __init__(
        self, objects: Objects, *, job_id: str, attempt: int, path: Path, interval_seconds: float
    ) -> None:
        """Prepare the thread.

        Args:
            objects: Where the chunks go.
            job_id: The job.
            attempt: Its attempt, which has a log of its own.
            path: The log.
            interval_seconds: Time between two looks at the log.
        """
        self._objects = objects
        self._job_id = job_id
        self._attempt = attempt
        self._path = path
        self._interval_seconds = interval_seconds
        self._stored_bytes = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._run,), name="log-uploads", daemon=True
        )  # the context carries the job and the attempt into the log lines

    def start(self) -> None:
        """Begin to look at the log."""
        self._thread.start()

    def close(self) -> None:
        """Store nothing more; a write that hangs is left behind."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def store(self) -> None:
        """Store what the log has grown by.

        An object store that does not answer raises `StoreError`: the next round stores more.
        """
        size_bytes = self._path.stat().st_size
        first = self._stored_bytes // CHUNK_BYTES
        for index in range(first, first + MAX_CHUNKS_AT_ONCE):
            start = index * CHUNK_BYTES
            if self._stored_bytes >= size_bytes or start >= size_bytes or self._closed.is_set():
                return
            with self._path.open("rb") as file:
                file.seek(start)
                data = file.read(CHUNK_BYTES)
            self._objects.put_bytes(chunk_key(self._job_id, self._attempt, index), data)
            self._stored_bytes = start + len(data)

    def _run(self) -> None:
        while not self._closed.wait(self._interval_seconds):
            try:
                self.store()
            except (StoreError, OSError) as error:
                _log.info("log_not_stored_yet", error=str(error))


def replace_by_whole_log(
    objects: Objects, *, key: str, path: Path, job_id: str, attempt: int
) -> None:
    """Store a whole log and remove the chunks that were stored while it grew.

    Args:
        objects: The object store.
        key: Of the whole log.
        path: The log.
        job_id: The job.
        attempt: Its attempt.

    A store that does not answer raises `StoreError`, a log that cannot be read `OSError`.
    """
    objects.put_file(key, path)
    delete_chunks(objects, job_id, attempt)
