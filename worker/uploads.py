"""Takes an attempt's checkpoints to the object store while training goes on."""

from __future__ import annotations

import shutil
import threading
import time
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from store import attempts
from store.database import run_in_transaction
from store.errors import LeaseLost, StorageUnavailable
from worker.scratch import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Engine

    from store.objects import Objects

KEPT_CHECKPOINTS = 2
"""The newest, and one before it in case the newest turns out to be damaged."""
_TRIES = 3
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    step: int
    folder: Path
    """Holds `step-N/` alone, so that the stored folder's manifest is not the checkpoint's own."""


class CheckpointUploads:
    """A thread that stores the newest waiting checkpoint; one overtaken by a newer is skipped."""

    def __init__(
        self,
        engine: Engine,
        objects: Objects,
        *,
        job_id: str,
        attempt: int,
        folder: Path,
        flush: Callable[[], bool],
        on_failed: Callable[[int, str], None],
    ) -> None:
        """Prepare the thread.

        Args:
            engine: Where the pointer is written, fenced by `attempt`.
            objects: Where the bytes go, under `jobs/<job>/a<attempt>/step-<N>`.
            job_id: The job.
            attempt: The fencing token.
            folder: Local space for copies that the child's own pruning cannot delete.
            flush: Writes the steps told so far; a resumed attempt does not tell them again, so a
                pointer never overtakes them.
            on_failed: Called with the step and the reason when a checkpoint could not be stored.
        """
        self._engine = engine
        self._objects = objects
        self._job_id = job_id
        self._attempt = attempt
        self._folder = folder
        self._flush = flush
        self._on_failed = on_failed
        self._changed = threading.Condition()
        self._waiting: _Waiting | None = None
        self._busy = False
        self._closed = False
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._run,), name="uploads", daemon=True
        )  # the context carries the job and the attempt into the log lines

    def start(self) -> None:
        """Begin to wait for checkpoints."""
        self._thread.start()

    def submit(self, step: int, folder: Path) -> None:
        """Have the checkpoint in `folder` stored; one deleted meanwhile was overtaken by newer."""
        if not folder.exists():
            _log.info("checkpoint_overtaken", step=step)
            return
        own = self._folder / f"upload-{step}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        snapshot(folder, own / f"step-{step}")
        with self._changed:
            overtaken, self._waiting = self._waiting, _Waiting(step=step, folder=own)
            self._changed.notify_all()
        if overtaken is not None:
            shutil.rmtree(overtaken.folder, ignore_errors=True)

    def drain(self, timeout_seconds: float) -> bool:
        """Wait until nothing waits to be stored; False when something still does."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while self._waiting is not None or self._busy:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._changed.wait(remaining)
        return True

    def close(self) -> None:
        """Stop after the upload that runs, if one does."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                waiting, self._waiting = self._waiting, None
                self._busy = True
            if waiting is not None:
                self._store(waiting)
                shutil.rmtree(waiting.folder, ignore_errors=True)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _store(self, waiting: _Waiting) -> None:
        for attempt in range(1, _TRIES + 1):
            try:
                self._store_once(waiting)
            except LeaseLost as error:  # the heartbeat ends the attempt
                _log.warning("checkpoint_refused", step=waiting.step, error=str(error))
                return
            except Exception as error:  # noqa: BLE001 - the store or the disk; the next try may pass
                _log.warning("checkpoint_upload_failed", step=waiting.step, error=str(error))
                if attempt == _TRIES:
                    self._on_failed(waiting.step, str(error))
                else:
                    time.sleep(0.5 * attempt)
            else:
                _log.info("checkpoint_stored", step=waiting.step)
                return

    def _store_once(self, waiting: _Waiting) -> None:
        """Store the bytes, then the steps, then the pointer.

        Raises:
            StorageUnavailable: The steps could not be written.
        """
        prefix = f"jobs/{self._job_id}/a{self._attempt}/step-{waiting.step}"
        manifest = self._objects.put_folder(prefix, waiting.folder)
        if not self._flush():
            raise StorageUnavailable("The steps before the checkpoint could not be written.")
        run_in_transaction(
            self._engine,
            lambda session: attempts.save_checkpoint_pointer(
                session,
                job_id=self._job_id,
                attempt=self._attempt,
                step=waiting.step,
                prefix=prefix,
                manifest_sha256=manifest.sha256,
                size_bytes=manifest.size_bytes,
            ),
        )
        self._prune()

    def _prune(self) -> None:
        """Delete all but the newest checkpoints: the row first, then its objects."""
        stored = run_in_transaction(
            self._engine, lambda session: attempts.list_checkpoints(session, self._job_id)
        )
        for old in stored[:-KEPT_CHECKPOINTS]:
            step = old.step
            prefix = run_in_transaction(
                self._engine,
                lambda session, step=step: attempts.forget_checkpoint(  # type: ignore[misc] # a default binds the loop's value
                    session, job_id=self._job_id, attempt=self._attempt, step=step
                ),
            )
            if prefix is not None:
                self._objects.delete_prefix(f"{prefix}/")
