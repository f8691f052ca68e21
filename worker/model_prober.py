"""Looks new base models up and probes them, in every worker and beside whatever else it does.

Each stage has places of its own, so that neither names that the hub does not answer nor its large
models keep a folder waiting. A model is claimed by one worker at a time; the claim of one that died
ends by itself.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

import structlog

from grit_core.errors import Interrupted, ModelUnavailable
from store import base_models
from store.base_models import Stage
from store.database import run_in_transaction, transaction
from store.errors import NotFound
from worker.hub import load_library, look_up
from worker.model_probe import probe_in_process

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from store.models import BaseModelRow
    from store.settings import Settings

PLACES: Final = {Stage.LOOK_UP: 64, Stage.HUB: 1, Stage.FOLDER: 1}
"""How many models are at a stage in one worker. A look-up waits for the network; a probe is a
process that computes for seconds."""
_SECOND_LOOK_SECONDS: Final = 10.0
"""Wait for the hub at a model's turn to be probed, when no request waits for the answer."""
_JOIN_SECONDS: Final = 5.0
_log = structlog.get_logger(__name__)


class ModelProber:
    """Takes registering models through their stages; no task of the worker waits for it."""

    def __init__(self, settings: Settings, engine: Engine, *, worker_id: str) -> None:
        """Prepare the prober; `start` begins.

        Args:
            settings: How this deployment is wired.
            engine: The rows.
            worker_id: Who claims them.
        """
        self._settings = settings
        self._engine = engine
        self._worker_id = worker_id
        self._wake = threading.Event()
        self._stopping = False
        self._busy = dict.fromkeys(Stage, 0)
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    def start(self) -> None:
        """Begin to look for models."""
        self._thread.start()

    def ring(self) -> None:
        """Look for models now. Returns at once."""
        self._wake.set()

    def drain(self) -> None:
        """Claim no more, and end what runs. For a signal handler: it only sets a flag."""
        self._stopping = True

    def stop(self) -> None:
        """End every probe; models that were claimed are left to other workers."""
        self.drain()
        self._wake.set()
        deadline = time.monotonic() + _JOIN_SECONDS
        with self._lock:
            threads = [self._thread, *self._threads]
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        load_library()
        failing = False
        while not self._stopping:
            self._wake.clear()
            try:
                for stage in Stage:
                    self._fill(stage)
                failing = False
            except Exception as error:  # noqa: BLE001 - the next round may find the database back
                if not failing:  # once for each outage
                    _log.warning("models_not_read", error=str(error))
                failing = True
            # The bell may be lost, or wait behind the job of a training worker.
            self._wake.wait(self._settings.reaper_seconds)

    def _fill(self, stage: Stage) -> None:
        """Claim as many models as the stage has free places, and begin with each."""
        with self._lock:
            free = PLACES[stage] - self._busy[stage]
        if free <= 0:
            return
        with transaction(self._engine, read_only=True) as session:
            if not base_models.is_waiting(session, stage):
                return
        rows = run_in_transaction(
            self._engine,
            lambda session: base_models.claim_models(
                session,
                stage,
                worker_id=self._worker_id,
                lease_seconds=self._settings.lease_seconds,
                limit=free,
            ),
        )
        for row in rows:
            # A probe's process dies with the thread that started it.
            thread = threading.Thread(
                target=self._advance, args=(stage, row), name=f"model-{stage}", daemon=True
            )
            with self._lock:
                self._busy[stage] += 1
                self._threads.add(thread)
            thread.start()

    def _advance(self, stage: Stage, row: BaseModelRow) -> None:
        """Take a model through one stage; whatever goes wrong, it and the others go on."""
        try:
            if stage == Stage.LOOK_UP:
                self._look_up(row)
            else:
                self._probe(stage, row)
        except Interrupted:
            _log.info("model_probe_interrupted", model=row.id)
            self._release(row.id)
        except NotFound:
            _log.info("model_deleted_meanwhile", model=row.id)
        except Exception:  # noqa: BLE001 - the log has it; the claim ends, and another try begins
            _log.exception("model_not_registered", model=row.id)
        finally:
            with self._lock:
                self._busy[stage] -= 1
                self._threads.discard(threading.current_thread())
            self._wake.set()

    def _look_up(self, row: BaseModelRow) -> None:
        answer = look_up(row.source, timeout_seconds=self._settings.hub_seconds)
        if answer.failure is not None:
            self._fail(row.id, code=answer.failure, message=answer.message)
        else:
            self._release(row.id, found=True)

    def _probe(self, stage: Stage, row: BaseModelRow) -> None:
        offline = False
        if stage == Stage.HUB:  # it may have been long ago that the hub was asked
            seconds = max(_SECOND_LOOK_SECONDS, self._settings.hub_seconds)
            answer = look_up(row.source, timeout_seconds=seconds)
            if answer.failure is not None:
                self._fail(row.id, code=answer.failure, message=answer.message)
                return
            offline = answer.offline
        try:
            inventory = probe_in_process(
                row.source, should_stop=self._holder(row.id), offline=offline
            )
        except ModelUnavailable as error:
            self._fail(row.id, code="model_unavailable", message=str(error))
            return
        run_in_transaction(
            self._engine,
            lambda session: base_models.save_inventory(
                session,
                id=row.id,
                inventory=inventory,
                inventory_hash=inventory["hash"],
                worker_id=self._worker_id,
            ),
        )
        _log.info("model_registered", model=row.id, num_layers=len(inventory["layers"]))

    def _holder(self, model_id: str) -> Callable[[], bool]:
        """Return what renews a claim while a probe runs, and says when the probe has to end."""
        due = time.monotonic() + self._settings.heartbeat_seconds
        lost = False

        def should_stop() -> bool:
            nonlocal due, lost
            if time.monotonic() >= due:
                due = time.monotonic() + self._settings.heartbeat_seconds
                lost = not run_in_transaction(
                    self._engine,
                    lambda session: base_models.renew_claim(
                        session,
                        id=model_id,
                        worker_id=self._worker_id,
                        lease_seconds=self._settings.lease_seconds,
                    ),
                )
            return lost or self._stopping

        return should_stop

    def _fail(self, model_id: str, *, code: str, message: str) -> None:
        _log.info("model_refused", model=model_id, code=code, reason=message[:500])
        run_in_transaction(
            self._engine,
            lambda session: base_models.save_failure(
                session, id=model_id, code=code, message=message, worker_id=self._worker_id
            ),
        )

    def _release(self, model_id: str, *, found: bool = False) -> None:
        run_in_transaction(
            self._engine,
            lambda session: base_models.release_claim(
                session, id=model_id, worker_id=self._worker_id, found=found
            ),
        )
