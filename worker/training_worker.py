"""A training worker: one device, one warm spare process, one attempt at a time."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import structlog

from store import attempts
from store.attempts import Failure, RetryPolicy
from store.database import run_in_transaction
from store.errors import StoreError
from worker import failures
from worker.child import Child
from worker.device_health import DeviceHealth
from worker.device_lock import DeviceLock, device_name
from worker.runner import Runner
from worker.scratch import DatasetCache, Scratch
from worker.workbench import Workbench

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from store.attempts import Claim
    from store.objects import Objects
    from store.settings import Settings

READY_SECONDS = 180.0
"""Longest wait for a training process to have imported everything."""
_LOCK_WAIT_SECONDS = 15.0
_log = structlog.get_logger(__name__)


class TrainingWorker:
    """Claims the jobs of one queue and runs them, each in a process of its own."""

    def __init__(
        self, settings: Settings, engine: Engine, objects: Objects, *, worker_id: str, queue: str
    ) -> None:
        """Prepare the worker; `open` makes it hold the device.

        Args:
            settings: How this deployment is wired.
            engine: The rows.
            objects: The bytes.
            worker_id: The id of this process in the table of workers.
            queue: The queue it claims from, named as its device: `cuda`, `mps` or `cpu`.
        """
        self.queue = queue
        self.draining = False
        """Set by a signal handler: a plain attribute, since a lock could be held right then."""
        self.health = DeviceHealth(queue)
        self._settings = settings
        self._engine = engine
        self._objects = objects
        self._worker_id = worker_id
        self._lock = DeviceLock(settings.home / "locks", device_name(queue))
        self._bench: Workbench | None = None
        self._spare: Child | None = None

    def open(self) -> None:
        """Take the device and start the first spare. Call it from the main thread."""
        self._lock.acquire(wait_seconds=_LOCK_WAIT_SECONDS)
        scratch = Scratch(self._settings.home, self._worker_id)
        scratch.sweep()
        self._bench = Workbench(
            settings=self._settings,
            engine=self._engine,
            objects=self._objects,
            scratch=scratch,
            datasets=DatasetCache(
                self._settings.home, bound_bytes=self._settings.dataset_cache_bytes
            ),
            worker_id=self._worker_id,
        )
        self.warm_up()

    def close(self) -> None:
        """End the spare, delete the scratch folders and give the device back."""
        if self._spare is not None:
            self._spare.dismiss()
            self._spare = None
        if self._bench is not None:
            self._bench.scratch.close()
            self._bench = None
        self._lock.release()

    def drain(self) -> None:
        """Claim no more, and have a running attempt save a checkpoint and hand its job back."""
        self.draining = True

    def warm_up(self) -> None:
        """Start a spare training process unless one is there."""
        if self._spare is None or not self._spare.alive:
            self._spare = self._start_child()

    def claim_until_empty(self) -> None:
        """Run one job after the other until the queue has none for this worker."""
        while not self.draining and self.health.fit():
            claim = self._claim()
            if claim is None:
                return
            with structlog.contextvars.bound_contextvars(
                job_id=claim.job.id, attempt=claim.attempt
            ):
                self._run(claim)

    def _claim(self) -> Claim | None:
        try:
            return run_in_transaction(
                self._engine,
                lambda session: attempts.claim_next(
                    session,
                    queue=self.queue,
                    worker_id=self._worker_id,
                    lease_seconds=self._settings.lease_seconds,
                    max_running_jobs=self._settings.max_running_jobs,
                    seen_within_seconds=self._settings.worker_seen_seconds,
                ),
            )
        except StoreError as error:  # the row stays where it is; the bell will ring again
            _log.warning("claim_failed", queue=self.queue, error=str(error))
            return None

    def _run(self, claim: Claim) -> None:
        bench = self._workbench
        try:
            child = self._take_spare()
        except OSError as error:  # a full disk, for one
            self._give_up(claim, error)
            return
        _log.info("attempt_started", child=child.pid, queue=self.queue)
        runner = Runner(
            bench,
            claim,
            child,
            draining=lambda: self.draining,
            on_stepping=self._try_to_warm_up,
        )
        try:
            runner.run()
        except Exception:  # noqa: BLE001 - the attempt is the reaper's now; the worker must go on
            _log.exception("attempt_broken")
        finally:
            child.dismiss()
            bench.scratch.remove(child.folder)
            self.health.note(runner.failure_code, job_id=claim.job.id)
            if not self.draining:
                self._try_to_warm_up()

    def _try_to_warm_up(self) -> None:
        try:
            self.warm_up()
        except OSError as error:  # the next attempt starts its process by itself
            _log.warning("no_spare", error=str(error))

    def _give_up(self, claim: Claim, error: OSError) -> None:
        """Fail an attempt for which no process could be started."""
        _log.error("no_process", error=str(error))
        failure = Failure(**asdict(failures.failure_of(error)))
        try:
            run_in_transaction(
                self._engine,
                lambda session: attempts.fail(
                    session,
                    job_id=claim.job.id,
                    attempt=claim.attempt,
                    failure=failure,
                    policy=RetryPolicy.of(self._settings),
                ),
            )
        except StoreError as refusal:  # the reaper takes it
            _log.warning("end_not_written", error=str(refusal))

    @property
    def _workbench(self) -> Workbench:
        if self._bench is None:
            raise RuntimeError("The training worker is not open.")
        return self._bench

    def _take_spare(self) -> Child:
        child = self._spare if self._spare is not None and self._spare.alive else None
        self._spare = None
        return child or self._start_child()

    def _start_child(self) -> Child:
        return Child(self._workbench.scratch.new_folder(), keep_fds=(self._lock.fd,))
