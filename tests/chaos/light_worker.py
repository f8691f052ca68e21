"""A worker that keeps the protocol of the rows and trains nothing.

`python -m tests.chaos.light_worker` claims, beats, reports metrics, stores an adapter's objects,
and publishes or gives up, by the functions of `store` that the real worker uses, some tens of jobs
a second. Every publication that the rows accepted becomes a line of its file of effects.
`--unfenced` takes whatever attempt the row holds for its own: the control that must be caught.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from grit_core.events import StepCompleted, event_to_json
from store import attempts, events, workers
from store.attempts import Claim, NewAdapter
from store.database import create_engine_from, run_in_transaction
from store.errors import IllegalTransition, LeaseLost, StoreError
from store.ids import new_id
from store.models import Job
from store.objects import Objects
from store.queue import Doorbell
from store.settings import Settings
from worker.periodic import Periodic
from worker.reconcile import reconcile

if TYPE_CHECKING:
    from sqlalchemy import Engine

_IDLE_SECONDS = 0.1
_PATIENCE_SECONDS = 30.0
NUM_STEPS = 3
"""Steps that every job here reports."""


class LightWorker:
    """Executes jobs of one queue until it is told to stop."""

    def __init__(self, settings: Settings, options: argparse.Namespace) -> None:
        self.settings = settings
        self.options = options
        self.engine: Engine = create_engine_from(settings)
        self.objects = Objects(settings)
        self.doorbell = Doorbell(settings)
        self.random = random.Random(options.seed)
        self.worker_id = new_id("wrk")
        self.stopping = False
        # Beside its jobs, as the real worker has it: a job that is slept through stops neither.
        self._periodic = [
            Periodic(
                "presence",
                lambda: run_in_transaction(self.engine, self._be_seen),
                interval_seconds=settings.worker_seen_seconds / 3,
            ),
            Periodic(
                "reconcile",
                lambda: reconcile(self.engine, self.doorbell, settings),
                interval_seconds=settings.reaper_seconds,
            ),
        ]

    def run(self) -> None:
        """Work until `stopping`; an outage is waited out."""
        for periodic in self._periodic:
            periodic.start()
        while not self.stopping:
            try:
                claim = run_in_transaction(self.engine, self._claim)
            except StoreError:
                time.sleep(_IDLE_SECONDS)
                continue
            if claim is None:
                time.sleep(_IDLE_SECONDS)
            else:
                self._execute(claim)

    def close(self) -> None:
        """Stop what runs beside, and close the connections."""
        for periodic in self._periodic:
            periodic.stop()
        self.doorbell.close()
        self.engine.dispose()

    def _claim(self, session: Session) -> Claim | None:
        return attempts.claim_next(
            session,
            queue=self.options.queue,
            worker_id=self.worker_id,
            lease_seconds=self.settings.lease_seconds,
        )

    def _be_seen(self, session: Session) -> None:
        try:
            workers.beat(session, self.worker_id)
        except StoreError:
            workers.register_worker(
                session,
                id=self.worker_id,
                hostname="chaos",
                process_id=os.getpid(),
                queues=[self.options.queue],
                device=self.options.queue,
            )

    def _execute(self, claim: Claim) -> None:
        job_id, attempt = claim.job.id, claim.attempt
        try:
            self._report(job_id, attempt)
            if self.random.random() < self.options.sleepy:
                time.sleep(2 * self.settings.lease_seconds)  # no heartbeat: its lease is lost
            adapter = self._store_adapter(job_id, attempt)
            self._publish(job_id, attempt, adapter)
        except LeaseLost:
            return
        except IllegalTransition:
            self._hand_back(job_id, attempt)
        except StoreError:
            return  # the reaper takes the job back

    def _report(self, job_id: str, attempt: int) -> None:
        steps = [event_to_json(_step(number)) for number in range(1, NUM_STEPS + 1)]

        def work(session: Session) -> None:
            attempts.heartbeat(
                session,
                job_id=job_id,
                attempt=attempt,
                worker_id=self.worker_id,
                lease_seconds=self.settings.lease_seconds,
            )
            events.record_progress(session, job_id, attempt, steps)

        run_in_transaction(self.engine, work)

    def _store_adapter(self, job_id: str, attempt: int) -> NewAdapter:
        adapter_id = new_id("adp")
        prefix = f"adapters/{adapter_id}"
        with tempfile.TemporaryDirectory() as folder:
            told = {"job": job_id, "attempt": attempt, "worker": self.worker_id}
            (Path(folder) / "adapter.json").write_text(json.dumps(told))
            manifest = self.objects.put_folder(prefix, Path(folder))
        details = {"manifest_sha256": manifest.sha256, "attempt": attempt}
        return NewAdapter(
            id=adapter_id, prefix=prefix, size_bytes=manifest.size_bytes, details=details
        )

    def _publish(self, job_id: str, attempt: int, adapter: NewAdapter) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                run_in_transaction(
                    self.engine, lambda session: self._end(session, job_id, attempt, adapter)
                )
            except (LeaseLost, IllegalTransition):
                raise
            except StoreError:
                if time.monotonic() > deadline:
                    raise
            else:
                break
        self._note({"job": job_id, "attempt": attempt, "adapter": adapter.id})

    def _end(self, session: Session, job_id: str, attempt: int, adapter: NewAdapter) -> None:
        if self.options.unfenced:
            attempt = session.get_one(Job, job_id).attempt
        attempts.complete(session, job_id=job_id, attempt=attempt, adapter=adapter, result={})

    def _hand_back(self, job_id: str, attempt: int) -> None:
        try:
            run_in_transaction(
                self.engine,
                lambda session: attempts.hand_back(
                    session, job_id=job_id, attempt=attempt, reason="as ordered"
                ),
            )
        except StoreError:
            return

    def _note(self, effect: dict[str, Any]) -> None:
        with self.options.effects.open("a") as file:
            file.write(json.dumps(effect) + "\n")


def _step(number: int) -> StepCompleted:
    return StepCompleted(
        step=number,
        total_steps=NUM_STEPS,
        epoch=1.0,
        train_loss=1.0 / number,
        learning_rate=1e-3,
        grad_norm=1.0,
        num_tokens=1,
        tokens_per_second=1.0,
        elapsed_seconds=0.1 * number,
    )


def main() -> None:
    """Work until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue", required=True)
    parser.add_argument("--effects", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sleepy", type=float, default=0.0, help="share of jobs slept through")
    parser.add_argument("--unfenced", action="store_true")
    worker = LightWorker(Settings(), parser.parse_args())

    def stop(*_: object) -> None:
        worker.stopping = True

    signal.signal(signal.SIGTERM, stop)
    worker.run()
    worker.close()


if __name__ == "__main__":
    main()
