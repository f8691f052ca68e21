"""The Celery tasks of training workers, and of all workers. A message only says: there is work."""

from __future__ import annotations

import structlog

from store.queue import CLAIM_TASK, REGISTER_MODELS_TASK
from worker.app import app, current_model_prober, current_training_worker

_log = structlog.get_logger(__name__)


@app.task(name=CLAIM_TASK)  # type: ignore[untyped-decorator] # celery ships no types
def claim(queue: str) -> None:
    """Run the queued jobs of `queue`, one after the other, until none is left."""
    worker = current_training_worker()
    if worker is None or worker.queue != queue:
        _log.error("bell_of_another_queue", queue=queue)
        return
    worker.claim_until_empty()


@app.task(name=REGISTER_MODELS_TASK)  # type: ignore[untyped-decorator] # as above
def register_models() -> None:
    """Have the worker look for base models. This returns at once: it looks beside its tasks."""
    prober = current_model_prober()
    if prober is not None:
        prober.ring()
