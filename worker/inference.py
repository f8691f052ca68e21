"""The inference worker: answers what waits in the mailbox, and reads the layers of new base models.

Loads torch when the first task needs it, or ahead of that once the worker is ready. Whatever goes
wrong with a request is answered: nobody waits for a request that was dropped silently.
"""

from __future__ import annotations

import shutil
import threading
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import structlog
from celery import signals

from grit_core.errors import (
    AdapterInvalid,
    GritError,
    InvalidConfig,
    InvalidDataset,
    ModelUnavailable,
)
from grit_core.records import parse_prompt
from store import base_models
from store.database import create_engine_from, transaction
from store.errors import StoreError
from store.inference import Mailbox
from store.objects import Objects
from store.queue import INFER_TASK, INFERENCE_QUEUES, REGISTER_MODELS_TASK
from store.settings import Settings
from worker.app import app
from worker.periodic import Periodic

if TYPE_CHECKING:
    from pathlib import Path

    from grit_core.generation import AdapterSource, Generation, GenerationEngine

_log = structlog.get_logger(__name__)


class AdapterCache:
    """Adapter folders on this machine's disk, every file verified when it came."""

    def __init__(self, home: Path, objects: Objects, *, max_adapters: int) -> None:
        self.folder = home / "cache" / "adapters"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._objects = objects
        self._max_adapters = max_adapters
        self._lock = threading.Lock()

    def fetch(self, adapter_id: str, *, prefix: str) -> Path:
        """Return the folder of an adapter, downloading it when it is not here."""
        folder = self.folder / adapter_id
        with self._lock:
            if not folder.is_dir():
                # It appears complete and with every SHA-256 checked, or not at all.
                self._objects.get_folder(prefix, folder)
                self._prune(keep=folder)
            folder.touch()
        return folder

    def _prune(self, *, keep: Path) -> None:
        folders = sorted(self.folder.glob("adp_*"), key=lambda one: one.stat().st_mtime)
        for folder in folders[: max(0, len(folders) - self._max_adapters)]:
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)


_import_lock = threading.Lock()


class InferenceWorker:
    """The engine of one device and what it needs of the store."""

    def __init__(self, settings: Settings, *, device: str) -> None:
        self._settings = settings
        self._device = device
        self._database = create_engine_from(settings)
        self._mailbox = Mailbox(settings)
        self._adapters = AdapterCache(
            settings.home, Objects(settings), max_adapters=settings.infer_cached_adapters
        )
        self._registering = threading.Lock()
        self._watch = Periodic(
            "models", self.register_models, interval_seconds=settings.ring_again_seconds
        )

    @cached_property
    def engine(self) -> GenerationEngine:
        """The generation engine; the first use loads torch."""
        with _import_lock:
            from grit_core.generation import GenerationEngine  # noqa: PLC0415 - loads torch

        return GenerationEngine(
            device=self._device,
            dtype="float32" if self._device == "cpu" else "bfloat16",
            max_bases=self._settings.infer_resident_models,
            max_adapters=self._settings.infer_resident_adapters,
        )

    def answer(self, request_id: str) -> None:
        """Take a request and answer it; one that is gone or that nobody waits for is left alone."""
        payload = self._mailbox.take(request_id)
        if payload is None or self._mailbox.is_cancelled(request_id):
            _log.info("request_gone", request_id=request_id)
            return
        started = time.time()
        try:
            reply = self._reply(payload, queue_seconds=max(0.0, started - payload["submitted_at"]))
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
            reply = {"error": _error_of(error)}
            _log.warning("request_failed", request_id=request_id, code=reply["error"]["code"])
        self._mailbox.answer(request_id, reply)

    def watch_models(self) -> None:
        """Load torch, and look now and then for models whose bell was lost; in a thread."""
        self._watch.start()

    def close(self) -> None:
        """Stop looking for models."""
        self._watch.stop()

    def register_models(self) -> None:
        """Read the layers of every base model that waits for it."""
        # The first import of transformers by two threads at once breaks its lazy names.
        _ = self.engine
        from grit_core.models.inventory import build_inventory  # noqa: PLC0415 - loads torch

        with self._registering:
            with transaction(self._database, read_only=True) as session:
                waiting = [(row.id, row.source) for row in base_models.registering(session)]
            for model_id, source in waiting:
                try:
                    inventory = build_inventory(source)
                except Exception as error:  # noqa: BLE001 - the reason goes into the row
                    code = (
                        "model_unavailable" if isinstance(error, GritError) else "model_unsupported"
                    )
                    _log.info("model_refused", model=model_id, code=code)
                    with transaction(self._database) as session:
                        base_models.save_failure(
                            session, id=model_id, code=code, message=str(error)
                        )
                    continue
                with transaction(self._database) as session:
                    base_models.save_inventory(
                        session,
                        id=model_id,
                        inventory=inventory.to_json(),
                        inventory_hash=inventory.hash,
                    )
                _log.info("model_registered", model=model_id, num_layers=len(inventory.layers))

    def _reply(self, payload: dict[str, Any], *, queue_seconds: float) -> dict[str, Any]:
        from grit_core.generation import GenerationRequest  # noqa: PLC0415 - loads torch

        started = time.perf_counter()
        request = GenerationRequest(
            chat=parse_prompt(payload["messages"]),
            max_new_tokens=payload["max_new_tokens"],
            temperature=payload["temperature"],
            top_p=payload["top_p"],
            seed=payload["seed"],
            stop=tuple(payload["stop"]),
        )
        adapter = self._adapter(payload["adapter"])
        fetched_seconds = time.perf_counter() - started
        found = self.engine.generate(payload["model"]["source"], request, adapter=adapter)
        return _reply_of(
            found,
            queue_seconds=queue_seconds,
            load_seconds=fetched_seconds + found.load_seconds,
            total_seconds=queue_seconds + time.perf_counter() - started,
        )

    def _adapter(self, named: dict[str, str] | None) -> AdapterSource | None:
        from grit_core.generation import AdapterSource  # noqa: PLC0415 - loads torch

        if named is None:
            return None
        folder = self._adapters.fetch(named["id"], prefix=named["prefix"])
        return AdapterSource(id=named["id"], folder=folder)


def _reply_of(found: Generation, **seconds: float) -> dict[str, Any]:
    return {
        "output": found.text,
        "finish_reason": found.finish_reason,
        "usage": {
            "prompt_tokens": found.prompt_tokens,
            "image_tokens": found.image_tokens,
            "completion_tokens": found.completion_tokens,
        },
        "timing": {**seconds, "first_token_seconds": found.first_token_seconds},
    }


def _error_of(error: Exception) -> dict[str, str]:
    """What the caller reads; the stack trace goes to the log and nowhere else."""
    if isinstance(error, InvalidConfig):
        return {"code": error.faults[0].code, "category": "user", "message": str(error)}
    if isinstance(error, InvalidDataset):
        return {"code": "chat_invalid", "category": "user", "message": str(error)}
    known: dict[type[Exception], str] = {
        AdapterInvalid: "adapter_invalid",
        ModelUnavailable: "model_unavailable",
        StoreError: "adapter_unavailable",
    }
    for kind, code in known.items():
        if isinstance(error, kind):
            return {"code": code, "category": "system", "message": str(error)}
    _log.exception("inference_unexpected", exc_info=error)
    message = "The inference worker failed unexpectedly; its log says why."
    return {"code": "unexpected", "category": "system", "message": message}


_worker: InferenceWorker | None = None
_worker_lock = threading.Lock()


def inference_worker(device: str) -> InferenceWorker:
    """Return the inference worker of this process, made on first use."""
    global _worker  # noqa: PLW0603 - one process serves one device
    with _worker_lock:
        if _worker is None:
            _worker = InferenceWorker(Settings(), device=device)
        return _worker


@app.task(name=INFER_TASK, bind=True)  # type: ignore[untyped-decorator] # celery ships no types
def infer(task: Any, request_id: str) -> None:
    """Answer the request of this id."""
    inference_worker(_device_of(task)).answer(request_id)


@app.task(name=REGISTER_MODELS_TASK, bind=True)  # type: ignore[untyped-decorator] # as above
def register_models(task: Any) -> None:
    """Read the layers of the base models that wait for it."""
    inference_worker(_device_of(task)).register_models()


def _device_of(task: Any) -> str:
    """The device of the queue that a task came through."""
    return str(task.request.delivery_info["routing_key"]).rpartition(".")[2]


def _on_ready(sender: Any, **_options: Any) -> None:
    """Load torch before the first request needs it, and look for models from then on."""
    queues = list(sender.app.amqp.queues.consume_from)
    if len(queues) != 1 or queues[0] not in INFERENCE_QUEUES:
        return

    inference_worker(queues[0].rpartition(".")[2]).watch_models()


signals.worker_ready.connect(_on_ready)
