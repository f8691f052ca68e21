"""The Celery app: `celery -A worker.app worker -Q cpu --pool solo`.

The queue that a worker consumes decides what it is. One of `cuda`, `mps`, `cpu` makes it the
training worker of that device; one of `infer.cuda`, `infer.mps`, `infer.cpu` an inference worker.
Importing this module loads no torch: a training worker stays light, its children train.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import structlog
from celery import Celery, bootsteps, signals
from celery.concurrency import get_implementation
from kombu.transport import TRANSPORT_ALIASES

from store.collection import collect_if_due
from store.database import create_engine_from
from store.ids import new_id
from store.objects import Objects
from store.queue import INFERENCE_QUEUES, TRAINING_QUEUES, Doorbell, create_celery
from store.startup import (
    check_tables_or_exit,
    load_settings_or_exit,
    refuse,
    report_unavailable_parts,
)
from worker.device_lock import DeviceTaken
from worker.logs import configure_logging
from worker.model_prober import ModelProber
from worker.periodic import Periodic
from worker.presence import Presence
from worker.reconcile import reconcile
from worker.training_worker import TrainingWorker

if TYPE_CHECKING:
    from celery.apps.worker import Worker

    from store.settings import Settings

_log = structlog.get_logger(__name__)
_BEAT_SHARE = 3
"""Beats of a worker's row within the time after which it counts as gone."""


class WorkerProcess:
    """What runs in a worker beside its tasks: its row, the reconciler, probes, perhaps training."""

    training: TrainingWorker | None = None
    """The training worker of this process, if it is one."""

    def __init__(self, settings: Settings, queues: list[str]) -> None:
        """Prepare the process.

        Args:
            settings: How this deployment is wired.
            queues: The queues named with `-Q`.
        """
        queue = one_queue(queues)
        self._engine = create_engine_from(settings)
        self._objects = Objects(settings)
        worker_id = new_id("wrk")
        self._presence = Presence(
            self._engine,
            worker_id=worker_id,
            queues=queues,
            device=queue.rpartition(".")[2],
            quarantine=lambda: self.training.health.quarantine if self.training else None,
            # Such a worker examines its device first, and no request should wait for it meanwhile.
            hidden=queue in INFERENCE_QUEUES and queue != "infer.cpu",
        )
        self._doorbell = Doorbell(settings)
        self.prober = ModelProber(settings, self._engine, worker_id=worker_id)
        self._periodic = [
            Periodic(
                "presence",
                self._presence.beat,
                interval_seconds=settings.worker_seen_seconds / _BEAT_SHARE,
            ),
            Periodic(
                "reconcile",
                lambda: reconcile(self._engine, self._doorbell, settings),
                interval_seconds=settings.reaper_seconds,
            ),
            Periodic(
                "collect",
                lambda: collect_if_due(self._engine, self._objects, settings),
                interval_seconds=settings.collect_seconds,
            ),
        ]
        if queue in TRAINING_QUEUES:
            self.training = TrainingWorker(
                settings, self._engine, self._objects, worker_id=worker_id, queue=queue
            )

    def start(self) -> None:
        """Begin; a training worker takes its device and warms its first process up.

        Raises:
            SystemExit: If the database has no tables that this code can use.
        """  # noqa: DOC502 - comes from `refuse`
        check_tables_or_exit("worker", self._engine)
        report_unavailable_parts(self._objects)
        if self.training is not None:
            self.training.open()
        for periodic in self._periodic:
            periodic.start()
        self.prober.start()

    def show(self) -> None:
        """Enter the list of live workers, if this has waited for an examined device."""
        try:
            self._presence.show()
        except Exception as error:  # noqa: BLE001 - the next beat writes it
            _log.warning("presence_not_written", error=str(error))

    def leave(self) -> None:
        """Leave the list of live workers, for good."""
        try:
            self._presence.leave()
        except Exception as error:  # noqa: BLE001 - the row ages out by itself
            _log.warning("presence_not_removed", error=str(error))

    def drain(self) -> None:
        """Take no new work. Called from a signal handler: it only sets flags."""
        self._presence.stopping = True
        self.prober.drain()
        if self.training is not None:
            self.training.drain()

    def stop(self) -> None:
        """End everything that was started."""
        self.prober.stop()
        for periodic in self._periodic:
            periodic.stop()
        if self.training is not None:
            self.training.close()
        self.leave()
        self._doorbell.close()
        self._engine.dispose()


_process: WorkerProcess | None = None


def current_training_worker() -> TrainingWorker | None:
    """Return the training worker of this process, if it is one."""
    return _process.training if _process is not None else None


def current_model_prober() -> ModelProber | None:
    """Return what probes base models in this process, if it is a worker."""
    return _process.prober if _process is not None else None


def show_worker() -> None:
    """Enter the list of live workers, where this process is a worker."""
    if _process is not None:
        _process.show()


def remove_worker() -> None:
    """Leave the list of live workers, where this process is one."""
    if _process is not None:
        _process.leave()


class ProcessStep(bootsteps.StartStopStep):  # type: ignore[misc] # celery ships no types
    """Starts and stops the `WorkerProcess` with Celery's worker, in its main thread."""

    def start(self, parent: Worker) -> None:
        """Start it, or end the process if it cannot serve its queues; the message says why."""
        global _process  # noqa: PLW0603 - one worker is one process
        queues = list(parent.app.amqp.queues.consume_from)
        try:
            check_pool(parent.pool_cls, one_queue(queues))
            _process = WorkerProcess(_settings, queues)
            _process.start()
        except (DeviceTaken, OSError, ValueError) as error:
            _log.critical("worker_refused", reason=str(error))
            refuse("worker", error)
        _log.info("worker_started", queues=queues)

    def stop(self, parent: Worker) -> None:  # noqa: ARG002 - the signature is Celery's
        """Stop it."""
        global _process  # noqa: PLW0603 - one worker is one process
        if _process is not None:
            _process.stop()
            _process = None


def create(settings: Settings) -> Celery:
    """Return the app with its tasks and with what runs beside them."""
    celery = create_celery(settings)
    celery.conf.update(
        include=["worker.tasks", "worker.inference"],
        worker_consumer="worker.messages:GuardedConsumer",
    )
    for scheme in ("redis", "rediss"):  # the transport of a URL has no setting
        TRANSPORT_ALIASES[scheme] = "worker.messages:GuardedTransport"
    celery.steps["worker"].add(ProcessStep)
    return celery


def one_queue(queues: list[str]) -> str:
    """Return the queue that decides what a worker is.

    Raises:
        ValueError: The queues are not exactly one of the known ones.
    """
    known = (*TRAINING_QUEUES, *INFERENCE_QUEUES)
    if len(queues) == 1 and queues[0] in known:
        return queues[0]
    raise ValueError(
        f"A worker serves one queue, not {', '.join(queues) or 'none'}. Name it with -Q:"
        f" {', '.join(known)}."
    )


def check_pool(pool: type, queue: str) -> None:
    """Check that tasks run in this process: what runs beside them is in it, and no fork has it.

    Args:
        pool: The class of Celery's pool.
        queue: What the worker serves.

    Raises:
        ValueError: It is not the pool that such a worker needs.
    """
    wanted, option = ("solo", "") if queue in TRAINING_QUEUES else ("threads", " -c 20")
    fits = issubclass(pool, get_implementation(wanted))
    if not fits:
        raise ValueError(f"A worker of the queue {queue} needs --pool {wanted}{option}.")


def _on_setup_logging(loglevel: int = logging.INFO, **_options: Any) -> None:
    # Celery's own default is WARNING, which would leave out what became of an attempt.
    configure_logging(min(loglevel, logging.INFO), secrets=_settings.secrets())


def _on_shutting_down(**_options: Any) -> None:
    if _process is not None:
        _process.drain()


signals.setup_logging.connect(_on_setup_logging)
signals.worker_shutting_down.connect(_on_shutting_down)
_settings = load_settings_or_exit("worker")
app = create(_settings)
