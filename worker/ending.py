"""How an attempt ends: published, failed, handed back or abandoned; each one fenced transaction."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from store import attempts, events
from store.attempts import Failure, NewAdapter, RetryPolicy
from store.database import run_in_transaction
from store.errors import IllegalTransition, StorageUnavailable, StoreError
from store.ids import new_id
from store.models import JobKind
from store.orphans import log_key
from worker import failures
from worker.child import LOG_NAME
from worker.log_uploads import replace_by_whole_log

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

    from grit_core.events import AdapterSaved, TrainingFailed, TrainingFinished
    from store.attempts import Claim
    from store.objects import Manifest
    from worker.child import Child
    from worker.reporter import Reporter
    from worker.uploads import CheckpointUploads
    from worker.workbench import Workbench

_PATIENCE_SECONDS = 600.0
"""How long a finished attempt waits for a database that is away; its fence keeps that safe."""
_FLUSH_SECONDS = 30.0
_UPLOAD_SECONDS = 300.0
_TRIES = 3
_log = structlog.get_logger(__name__)


class Ending:
    """Writes the end of one attempt, after its child is gone."""

    def __init__(
        self,
        bench: Workbench,
        claim: Claim,
        *,
        child: Child,
        reporter: Reporter,
        uploads: CheckpointUploads,
    ) -> None:
        self._bench = bench
        self._job = claim.job
        self._job_id = claim.job.id
        self._attempt = claim.attempt
        self._child = child
        self._reporter = reporter
        self._uploads = uploads
        self._policy = RetryPolicy.of(bench.settings)

    def publish(self, saved: AdapterSaved, finished: TrainingFinished) -> None:
        """Store the adapter, read it back, and mark the job `succeeded`.

        Raises:
            StoreError: The row refused it, because a newer attempt exists, or is out of reach.
        """
        self._reporter.phase("publishing")
        adapter_id = new_id("adp")
        prefix = f"adapters/{adapter_id}"
        try:
            manifest = self._store_adapter(prefix, Path(saved.folder))
        except (StoreError, OSError) as error:
            _log.warning("adapter_not_stored", exc_info=True)
            self.fail(failures.storage_failed("adapter", error))
            return
        self._settle()
        adapter = NewAdapter(
            id=adapter_id,
            prefix=prefix,
            sha256=saved.sha256,
            size_bytes=manifest.size_bytes,
            trainable_parameters=saved.trainable_parameters,
            name=self._job.name,
            details={"manifest_sha256": manifest.sha256, **_ranks(finished)},
        )
        try:
            self._insist(lambda session: self._complete(session, adapter, saved, finished))
        except IllegalTransition:
            self._discard(prefix)
            self.hand_back("cancelled on request")
        except StoreError:
            self._discard(prefix)
            raise

    def fail(self, failure: TrainingFailed) -> None:
        """Record why the attempt failed; the row decides whether it is tried again."""
        self._settle()
        values = asdict(failure)
        self._insist(
            lambda session: attempts.fail(
                session,
                job_id=self._job_id,
                attempt=self._attempt,
                failure=Failure(**values),
                policy=self._policy,
            )
        )

    def hand_back(self, reason: str) -> None:
        """Give the job back: cancelled, paused or queued again, as its row says."""
        self._settle()
        self._insist(
            lambda session: attempts.hand_back(
                session,
                job_id=self._job_id,
                attempt=self._attempt,
                reason=reason,
                policy=self._policy,
            )
        )

    def abandon(self) -> None:
        """Publish nothing: another attempt has the job, or will have it."""
        self._store_log()

    def _settle(self) -> None:
        """Bring everything that the end refers to into the stores first."""
        if not self._uploads.drain(_UPLOAD_SECONDS):
            _log.warning("checkpoint_left_behind")
        if not self._reporter.flush(_FLUSH_SECONDS):
            _log.warning("events_left_behind")
        self._store_log()

    def _store_log(self) -> None:
        key = log_key(self._job_id, self._attempt)
        try:
            replace_by_whole_log(
                self._bench.objects,
                key=key,
                path=self._child.folder / LOG_NAME,
                job_id=self._job_id,
                attempt=self._attempt,
            )
        except (StoreError, OSError) as error:
            _log.warning("log_not_stored", error=str(error))

    def _store_adapter(self, prefix: str, folder: Path) -> Manifest:
        """Store the adapter and read every byte back.

        Raises:
            StorageUnavailable: It could not be stored at all.
            StoreError: It could not be stored, or came back different, three times.
            OSError: A local file could not be read or written.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                manifest = self._bench.objects.put_folder(prefix, folder)
                back = self._child.folder / "read-back"
                shutil.rmtree(back, ignore_errors=True)
                self._bench.objects.get_folder(prefix, back)
            except (StoreError, OSError) as error:
                if attempt == _TRIES:
                    raise
                _log.warning("adapter_upload_failed", error=str(error))
                time.sleep(0.5 * attempt)
            else:
                return manifest
        raise StorageUnavailable("The adapter could not be stored.")

    def _complete(
        self,
        session: Session,
        adapter: NewAdapter,
        saved: AdapterSaved,
        finished: TrainingFinished,
    ) -> None:
        compression = self._job.kind == JobKind.COMPRESSION
        attempts.complete(
            session,
            job_id=self._job_id,
            attempt=self._attempt,
            adapter=adapter,
            result={
                "adapter": adapter.id,
                "final_loss": None if compression else finished.train_loss,
                "eval_loss": finished.eval_loss,
                "steps": finished.step,
                "trainable_parameters": saved.trainable_parameters,
                "effective_rank": events.last_effective_ranks(session, self._job_id),
                "retention": self._retention(finished),
                "compaction": finished.compaction,
                "max_logit_difference": saved.max_logit_difference,
                "sha256": saved.sha256,
            },
        )

    def _retention(self, finished: TrainingFinished) -> dict[str, Any] | None:
        if self._job.retention_dataset_id is None:
            return None
        return {
            "dataset": self._job.retention_dataset_id,
            "loss_before": finished.retention_loss_before,
            "loss_after": finished.retention_loss_after,
        }

    def _discard(self, prefix: str) -> None:
        try:
            self._bench.objects.delete_prefix(f"{prefix}/")
        except (StoreError, OSError) as error:
            _log.warning("adapter_not_discarded", prefix=prefix, error=str(error))

    def _insist(self, work: Callable[[Session], Any]) -> None:
        """Write the end, for as long as a database that is away may come back.

        Raises:
            StorageUnavailable: It did not come back in time; the reaper will take the job.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                run_in_transaction(self._bench.engine, work)
            except StorageUnavailable as error:
                if time.monotonic() > deadline:
                    raise
                _log.warning("end_delayed", error=str(error))
                time.sleep(1.0)
            else:
                return


def _ranks(finished: TrainingFinished) -> dict[str, Any]:
    """What an adapter of different ranks tells of itself; nothing where every layer has its own."""
    return {} if finished.compaction is None else {"ranks": finished.compaction["ranks"]}
