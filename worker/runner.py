"""Supervises one attempt: hands a claimed job to a training process and sees it to an end.

Training happens in the child, rows and objects are written here. Three threads help: the heartbeat
extends the lease and brings orders, the reporter writes events, the uploads store checkpoints. This
thread alone decides what becomes of the child and of the row.
"""

from __future__ import annotations

import math
import queue
import time
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from grit_core.events import (
    AdapterSaved,
    CheckpointSaved,
    Compacted,
    RowsChecked,
    StepCompleted,
    TrainingFailed,
    TrainingFinished,
    TrainingStarted,
    Warned,
    event_to_json,
)
from store import attempts, events
from store.database import run_in_transaction
from store.errors import LeaseLost, StoreError
from store.models import JobKind
from worker import failures
from worker.child import LOG_NAME, Beat, Exited
from worker.ending import Ending
from worker.heartbeat import Heartbeat
from worker.inputs import fetch_inputs
from worker.log_uploads import LogUploads
from worker.reporter import Reporter
from worker.space import shortage
from worker.uploads import CheckpointUploads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.orm import Session

    from grit_core.events import TrainingEvent
    from store.attempts import Claim, Orders
    from worker.child import Child
    from worker.workbench import Workbench

STEPS_BEFORE_NEXT_SPARE = 5
"""The next process is warmed up only then: its imports would compete with this job's first step."""
_TICK_SECONDS = 0.1
_FLUSH_SECONDS = 30.0
_QUIET_EVENTS = (CheckpointSaved, TrainingFailed)
"""Told by other means: by the checkpoint's pointer, by the job's failure."""
_WORKING = {JobKind.TRAINING: "training", JobKind.COMPRESSION: "compressing"}
"""The phase of a job whose process is at it."""
_log = structlog.get_logger(__name__)


class Verdict(IntEnum):
    """Why the child is being ended; a higher one overrules a lower one."""

    NONE = 0
    STALLED = 1
    DRAINING = 2
    PAUSED = 3
    CANCELLED = 4
    LOST = 5


class Runner:
    """One attempt, from its claim to its end."""

    def __init__(
        self,
        bench: Workbench,
        claim: Claim,
        child: Child,
        *,
        draining: Callable[[], bool],
        on_stepping: Callable[[], None],
    ) -> None:
        """Prepare the attempt.

        Args:
            bench: What the attempts of this worker share.
            claim: The claimed job; its attempt number fences every write.
            child: A warm training process; it is ended in any case.
            draining: Whether the worker is shutting down.
            on_stepping: Called once in this thread when training is under way.
        """
        self._bench = bench
        self._claim = claim
        self._job_id = claim.job.id
        self._child = child
        self._draining = draining
        self._on_stepping: Callable[[], None] | None = on_stepping
        self._settings = bench.settings
        self._verdict = Verdict.NONE
        self._lost: str | None = None
        self._orders: Orders | None = None
        self._kill_at = math.inf
        self._progress_at = time.monotonic()
        self._steps = 0
        self._failure: TrainingFailed | None = None
        self._adapter: AdapterSaved | None = None
        self._finished: TrainingFinished | None = None
        self._heartbeat = Heartbeat(
            self._beat,
            interval_seconds=self._settings.heartbeat_seconds,
            lease_seconds=self._settings.lease_seconds,
            on_orders=self._on_orders,
            on_lost=self._on_lost,
        )
        self._reporter = Reporter(self._write, on_lost=self._on_lost)
        self._uploads = CheckpointUploads(
            bench.engine,
            bench.objects,
            job_id=self._job_id,
            attempt=claim.attempt,
            folder=child.folder / "uploads",
            flush=lambda: self._reporter.flush(_FLUSH_SECONDS),
            on_failed=self._warn_of_upload,
        )

        self._log_uploads = LogUploads(
            bench.objects,
            job_id=self._job_id,
            attempt=claim.attempt,
            path=child.folder / LOG_NAME,
            interval_seconds=self._settings.heartbeat_seconds,
        )

    def run(self) -> None:
        """Train and write the end to the row; whatever goes wrong ends this attempt and no more."""
        oom_kills = failures.oom_kills()
        self._heartbeat.start()
        self._reporter.start()
        self._uploads.start()
        self._log_uploads.start()
        try:
            if self._begin():
                self._supervise(oom_kills)
            self._log_uploads.close()  # the whole log takes the place of its chunks
            self._end()
        except LeaseLost as error:
            _log.warning("attempt_fenced", reason=str(error))
        finally:
            self._child.dismiss()
            self._heartbeat.stop()
            self._log_uploads.close()
            self._uploads.close()
            self._reporter.close()

    @property
    def failure_code(self) -> str | None:
        """Why the attempt failed, if it did."""
        return self._failure.code if self._failure is not None else None

    # --- the beginning

    def _begin(self) -> bool:
        """Fetch the inputs and hand them over; False when the attempt has already failed."""
        self._reporter.phase("preparing")
        try:
            self._failure = shortage(self._claim.job, self._child.folder)
            if self._failure is not None:
                return False
            inputs = fetch_inputs(self._bench, self._claim, work_dir=self._child.folder)
            for warning in inputs.warnings:
                self._report(warning)
            if self._decide() is Verdict.NONE:
                self._reporter.phase("loading")
                self._child.begin(inputs.order)
        except (StoreError, OSError) as error:
            _log.warning("inputs_unavailable", exc_info=True)
            self._failure = failures.storage_failed("job's inputs", error)
            return False
        except Exception as error:  # noqa: BLE001 - an old row that this version cannot read, for one
            _log.exception("inputs_unusable")
            self._failure = failures.failure_of(error)
            return False
        self._progress_at = time.monotonic()
        return self._verdict is Verdict.NONE

    # --- while it runs

    def _supervise(self, oom_kills: int) -> None:
        while True:
            try:
                message = self._child.inbox.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                self._enforce()
                continue
            if isinstance(message, Exited):
                self._explain(message, killed_for_memory=failures.oom_kills() > oom_kills)
                return
            if isinstance(message, Beat):
                self._progress_at = time.monotonic()
            else:
                self._take(message)
            self._enforce()

    def _take(self, event: TrainingEvent) -> None:
        self._progress_at = time.monotonic()
        self._report(event)
        match event:
            case RowsChecked():
                self._reporter.phase("checking" if event.done < event.total else "loading")
            case TrainingStarted():
                self._reporter.phase(_WORKING[JobKind(self._claim.job.kind)])
            case StepCompleted():
                self._after_step(event)
            case CheckpointSaved():
                self._submit_checkpoint(event)
            case Compacted():
                self._reporter.phase("saving")
            case AdapterSaved():
                self._adapter = event
            case TrainingFinished():
                self._finished = event
            case TrainingFailed():
                share = self._settings.train_device_memory_share
                self._failure = failures.name_memory_share(event, share)
            case _:
                pass

    def _after_step(self, event: StepCompleted) -> None:
        self._steps = event.step
        if event.step >= event.total_steps:
            self._reporter.phase("saving")
        elif event.step >= STEPS_BEFORE_NEXT_SPARE and self._on_stepping is not None:
            warm_up, self._on_stepping = self._on_stepping, None
            warm_up()

    def _submit_checkpoint(self, event: CheckpointSaved) -> None:
        try:
            self._uploads.submit(event.step, Path(event.folder))
        except OSError as error:
            self._warn_of_upload(event.step, str(error))

    def _decide(self) -> Verdict:
        """Raise the verdict to what the lease, the users and the worker want now."""
        wanted = Verdict.NONE
        orders = self._orders
        if self._lost is not None or self._heartbeat.expired:
            wanted = Verdict.LOST
        elif orders is not None and orders.cancel:
            wanted = Verdict.CANCELLED
        elif orders is not None and orders.pause:
            wanted = Verdict.PAUSED
        elif self._draining():
            wanted = Verdict.DRAINING
        elif time.monotonic() - self._progress_at > self._settings.stall_seconds:
            wanted = Verdict.STALLED
        self._verdict = max(self._verdict, wanted)
        return self._verdict

    def _enforce(self) -> None:
        """Carry the verdict out on the child."""
        before = self._verdict
        verdict = self._decide()
        if verdict is not before:
            _log.info("ending_child", verdict=verdict.name.lower())
            if verdict in {Verdict.PAUSED, Verdict.DRAINING} and self._kill_at == math.inf:
                self._child.ask_to_stop()
                self._kill_at = time.monotonic() + self._settings.stop_grace_seconds
            elif verdict in {Verdict.STALLED, Verdict.CANCELLED, Verdict.LOST}:
                self._child.kill()
        if time.monotonic() > self._kill_at:
            self._child.kill()

    def _explain(self, exited: Exited, *, killed_for_memory: bool) -> None:
        """Find the failure of a child that ended without success and without a word."""
        complete = self._adapter is not None and self._finished is not None
        if self._failure is not None or complete:
            return
        if self._verdict is Verdict.STALLED:
            self._failure = failures.stalled(
                stall_seconds=self._settings.stall_seconds, steps=self._steps
            )
        elif self._verdict is Verdict.NONE:
            self._failure = failures.failure_of_exit(
                exited.returncode,
                steps=self._steps,
                killed_for_memory=killed_for_memory,
            )

    # --- the end

    def _end(self) -> None:
        ending = Ending(
            self._bench,
            self._claim,
            child=self._child,
            reporter=self._reporter,
            uploads=self._uploads,
        )
        verdict = self._decide() if self._failure is None else self._verdict
        _log.info(
            "attempt_ended",
            verdict=verdict.name.lower(),
            failure=self._failure.code if self._failure else None,
            steps=self._steps,
        )
        if self._lost is not None:
            verdict = Verdict.LOST
        if verdict is Verdict.LOST:
            ending.abandon()
        elif verdict is Verdict.CANCELLED:
            ending.hand_back("cancelled on request")
        elif self._adapter is not None and self._finished is not None and self._failure is None:
            ending.publish(self._adapter, self._finished)
        elif self._failure is not None:
            ending.fail(self._failure)
        elif verdict is Verdict.PAUSED:
            ending.hand_back("paused on request")
        else:
            ending.hand_back("the worker is shutting down")

    # --- called from other threads

    def _beat(self) -> Orders:
        return run_in_transaction(
            self._bench.engine,
            lambda session: attempts.heartbeat(
                session,
                job_id=self._job_id,
                attempt=self._claim.attempt,
                worker_id=self._bench.worker_id,
                lease_seconds=self._settings.lease_seconds,
            ),
            tries=2,
        )

    def _on_orders(self, orders: Orders) -> None:
        self._orders = orders

    def _on_lost(self, reason: str) -> None:
        self._lost = reason
        self._child.kill()

    def _warn_of_upload(self, step: int, reason: str) -> None:
        self._report(
            Warned(
                code="checkpoint_not_stored",
                message=f"The checkpoint of step {step} could not be stored: {reason}",
            )
        )

    def _report(self, event: TrainingEvent) -> None:
        if isinstance(event, _QUIET_EVENTS):
            return
        urgent = isinstance(event, TrainingStarted | Warned)
        self._reporter.report(event_to_json(event), urgent=urgent)

    def _write(self, documents: Sequence[dict[str, Any]], phase: str | None) -> None:
        def work(session: Session) -> None:
            if documents:
                events.record_progress(session, self._job_id, self._claim.attempt, documents)
            if phase is not None:
                attempts.set_phase(
                    session, job_id=self._job_id, attempt=self._claim.attempt, phase=phase
                )

        run_in_transaction(self._bench.engine, work)
