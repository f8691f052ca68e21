"""The inference worker: answers what waits in the mailbox.

Loads torch when the first task needs it, or ahead of that once the worker is ready. Whatever goes
wrong with a request is answered: nobody waits for a request that was dropped silently.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import structlog
from celery import signals

from grit_core.errors import (
    AdapterInvalid,
    DeviceUnavailable,
    Interrupted,
    InvalidConfig,
    InvalidDataset,
    InvalidTurn,
    ModelUnavailable,
)
from grit_core.library_errors import (
    DeviceFault,
    find_device_fault,
    is_device_failure,
    ran_out_of_memory,
    reason,
)
from grit_core.records import InvalidRecord, parse_prompt
from grit_core.tools.definitions import parse_tool_use
from store.errors import ObjectMissing, QueueUnavailable, StorageUnavailable, StoreError
from store.inference import Mailbox
from store.objects import Objects
from store.queue import INFER_TASK, INFERENCE_QUEUES
from store.settings import Settings
from worker.adapter_cache import AdapterCache
from worker.answer_stream import NEWS_SECONDS, AnswerStream, WholeAnswer
from worker.app import app, remove_worker, show_worker
from worker.device_check import NoMemory, find_fault
from worker.device_loss import LOST_ERROR, DeviceLoss
from worker.device_memory import limit_device_memory
from worker.periodic import Periodic
from worker.running import RunningRequest, RunningRequests

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grit_core.generation import AdapterSource, Generation, GenerationEngine

_log = structlog.get_logger(__name__)


EXTRA_PLACES: Final = 3
"""Requests taken beyond a batch: they are read and encoded while the batch runs."""
LOOK_SECONDS: Final = 1.0
"""How often the mailbox is looked into without a bell."""

EXAMINATION_SECONDS: Final = 120.0
"""Longest examination of a device at the start: its driver may hang."""
JOIN_SECONDS: Final = 2.0
SEND_AGAIN_SECONDS: Final = 0.5

_import_lock = threading.Lock()


class InferenceWorker:
    """The engine of one device and what it needs of the store."""

    def __init__(self, settings: Settings, *, device: str) -> None:
        self._settings = settings
        self._device = device
        self._mailbox = Mailbox(settings)
        self._adapters = AdapterCache(
            settings.home, Objects(settings), max_adapters=settings.infer_cached_adapters
        )
        self._running = RunningRequests(self._mailbox, lost_seconds=settings.infer_lost_seconds)
        self._loss = DeviceLoss(
            self._running,
            self._mailbox,
            device=device,
            settle=self._take_all_places,
            leave=remove_worker,
        )
        self._examined = threading.Event()
        """Whether the device computes: nothing is taken before that."""
        if device == "cpu":
            self._examined.set()
        self._engine: GenerationEngine | None = None
        self._num_places = settings.infer_max_batch + EXTRA_PLACES
        self._free = threading.Semaphore(self._num_places)
        self._rung = threading.Event()
        self._stop_at: float | None = None
        self._threads: set[threading.Thread] = set()
        self._look = Periodic("look", self.look, interval_seconds=LOOK_SECONDS)

    @property
    def engine(self) -> GenerationEngine:
        """The generation engine; the first use loads torch."""
        # The first import of transformers by two threads at once breaks its lazy names.
        with _import_lock:
            if self._engine is None:
                from grit_core.generation import GenerationEngine  # noqa: PLC0415 - loads torch

                settings = self._settings
                limit_device_memory(self._device, settings.infer_device_memory_share)
                self._engine = GenerationEngine(
                    device=self._device,
                    dtype="auto",  # as the card has it: this process is where the card is
                    max_bases=settings.infer_resident_models,
                    max_adapters=settings.infer_resident_adapters,
                    max_batch=settings.infer_max_batch,
                    max_rank=settings.infer_max_rank,
                    max_adapter_bytes=settings.infer_adapter_bytes,
                    max_key_bytes=settings.infer_key_bytes,
                    image_cache_bytes=settings.infer_image_cache_bytes,
                    prefix_cache_bytes=settings.infer_prefix_cache_bytes,
                )
            return self._engine

    def start(self) -> None:
        """Load torch, examine the device, and look for requests whose bell was lost."""
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()
        self._running.start()
        self._look.start()

    def drain(self) -> None:
        """Take nothing new; what runs has `stop_grace_seconds`. For a signal handler."""
        self._stop_at = time.monotonic() + self._settings.stop_grace_seconds

    def close(self) -> None:
        """Wait for what runs, for as long as it may, and end all threads."""
        if self._stop_at is None:
            self.drain()
        self._look.stop()
        for thread in list(self._threads):
            thread.join(max(0.0, (self._stop_at or 0.0) - time.monotonic()) + JOIN_SECONDS)
        self._running.stop()
        if self._engine is not None:
            self._engine.close()
        self._adapters.close()
        self._mailbox.close_sync()

    def _warm_up(self) -> None:
        """Load torch, and begin to take requests once the device computes."""
        try:
            _ = self.engine
            fault = None if self._examined.is_set() else self._examine()
        except NoMemory as error:  # the device works, and its memory may be free by then
            _log.warning("device_full", device=self._device, reason=str(error))
            fault = None
        except Exception as error:
            if self._device == "cpu":  # each request says so by itself
                raise
            _log.exception("device_unusable", device=self._device)
            fault = reason(error)
        if fault is not None:
            self._loss.declare(f"it failed its examination: {fault}")
        elif not self._examined.is_set():
            show_worker()
            self._examined.set()

    def _examine(self) -> str | None:
        """Return what is wrong with the device; one that hangs in a driver ends the process."""
        watch = threading.Timer(
            EXAMINATION_SECONDS,
            self._loss.declare,
            [f"it did not end its examination within {EXAMINATION_SECONDS:g} s"],
        )
        watch.daemon = True
        watch.start()
        try:
            return find_fault(self._device)
        finally:
            watch.cancel()

    # --- taking requests

    def serve(self) -> None:
        """Answer what waits, one request after the other; a bell calls this in its own thread.

        Without a free place it returns: those who have one go on until nothing waits.
        """
        # A bell that found no place is heard by whoever gives one up just then.
        self._rung.set()
        while self._rung.is_set() and self._free.acquire(blocking=False):
            try:
                self._rung.clear()
                self._serve_all(self._take())
            finally:
                self._free.release()

    def look(self) -> None:
        """Answer what waits, in threads of our own: its bell may have been lost."""
        while self._free.acquire(blocking=False):
            thread: threading.Thread | None = None
            try:
                payload = self._take()
                if payload is None:
                    return
                thread = threading.Thread(target=self._serve_here, args=(payload,), daemon=True)
                self._threads.add(thread)
                thread.start()
            finally:
                if thread is None:
                    self._free.release()

    def _serve_here(self, payload: dict[str, Any]) -> None:
        try:
            self._serve_all(payload)
        finally:
            self._free.release()
            self._threads.discard(threading.current_thread())
        if self._rung.is_set():
            self.serve()

    def _serve_all(self, payload: dict[str, Any] | None) -> None:
        while payload is not None:
            self._answer(payload)
            payload = self._take()

    def _take_all_places(self, seconds: float) -> None:
        """Wait until no thread takes or answers a request, or for so many seconds."""
        deadline = time.monotonic() + seconds
        for _ in range(self._num_places):
            if not self._free.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return

    def _take(self) -> dict[str, Any] | None:
        if self._stop_at is not None or self._loss.declared or not self._examined.is_set():
            return None
        try:
            return self._mailbox.take_next(self._device)
        except QueueUnavailable as error:
            _log.warning("mailbox_silent", reason=str(error))
            return None

    # --- answering

    def _answer(self, payload: dict[str, Any]) -> None:
        """Answer a request; one that nobody waits for any more is left alone."""
        request_id = payload["id"]
        with self._running.one(request_id) as running:
            try:
                reply = self._reply(payload, running)
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
                # Asked of the first that meets the failure: the last one would seem to be alone.
                is_only = len(self._running) == 1
                if is_device_failure(error):
                    is_only &= self._loss.declare(reason(error), error=error)
                if running.cancelled:
                    _log.info("request_cancelled", request_id=request_id)
                    reply = None
                else:
                    reply = {"error": self._describe(error, is_only=is_only)}
                    code = reply["error"]["code"]
                    _log.warning("request_failed", request_id=request_id, code=code)
            self._end(request_id, reply)

    def _describe(self, error: Exception, *, is_only: bool) -> dict[str, Any]:
        """Return what the caller reads of an error.

        Args:
            error: What was raised.
            is_only: No other request was being answered when the device failed.
        """
        if not self._loss.declared:
            return _describe_error(error, memory_share=self._settings.infer_device_memory_share)
        # With others beside it, it is not known whose fault an assertion was.
        if is_only and find_device_fault(error) is DeviceFault.ASSERTION:
            message = (
                f"The device refused what the request gave it ({reason(error)}). Most often the"
                " tokenizer has tokens that the model has no embeddings for."
            )
            return {"code": "device_assertion", "category": "user", "message": message}
        return LOST_ERROR

    def _end(self, request_id: str, reply: dict[str, Any] | None) -> None:
        """Send the last message, for as long as the caller believes in us."""
        deadline = time.monotonic() + self._settings.infer_lost_seconds
        while True:
            try:
                if reply is None:
                    self._mailbox.finish(request_id)
                else:
                    self._mailbox.answer(request_id, reply)
            except QueueUnavailable as error:
                if time.monotonic() > deadline:
                    _log.warning("answer_not_sent", request_id=request_id, reason=str(error))
                    return
                time.sleep(SEND_AGAIN_SECONDS)
            else:
                return

    def _reply(self, payload: dict[str, Any], running: RunningRequest) -> dict[str, Any]:
        queue_seconds = max(0.0, time.time() - payload["submitted_at"])
        started = time.perf_counter()
        engine = self.engine
        from grit_core.generation import GenerationRequest  # noqa: PLC0415 - loads torch

        request = GenerationRequest(
            chat=parse_prompt(payload["messages"]),
            max_new_tokens=payload["max_new_tokens"],
            shorten_to_fit=payload.get("shorten_to_fit", False),
            temperature=payload["temperature"],
            top_p=payload["top_p"],
            seed=payload["seed"],
            stop=tuple(payload["stop"]),
            grammar=payload.get("grammar", ""),
            tools=parse_tool_use(payload.get("tools")),
        )
        pieces = self._pieces(running.id, streams=payload.get("stream", False))

        def should_stop() -> bool:
            pieces.flush_due()
            out_of_time = self._stop_at is not None and time.monotonic() > self._stop_at
            return running.cancelled or out_of_time or self._loss.declared

        with self._adapter(payload["adapter"]) as adapter:
            fetched_seconds = time.perf_counter() - started
            found = engine.generate(
                payload["model"]["source"],
                request,
                adapter=adapter,
                on_text=pieces.add,
                on_call=pieces.add_call,
                should_stop=should_stop,
            )
        return _reply_of(
            found,
            queue_seconds=queue_seconds,
            load_seconds=fetched_seconds + found.load_seconds,
            total_seconds=queue_seconds + time.perf_counter() - started,
        )

    def _pieces(self, request_id: str, *, streams: bool) -> AnswerStream | WholeAnswer:
        if streams:
            return AnswerStream(self._mailbox, request_id)
        every_seconds = min(NEWS_SECONDS, self._settings.infer_timeout_seconds / 4)
        return WholeAnswer(self._mailbox, request_id, every_seconds=every_seconds)

    @contextmanager
    def _adapter(self, named: dict[str, str] | None) -> Iterator[AdapterSource | None]:
        """Hold an adapter's files, so that they stay as they are until the answer is whole."""
        from grit_core.generation import AdapterSource  # noqa: PLC0415 - loads torch

        if named is None:
            yield None
            return
        with self._adapters.hold(named["id"], prefix=named["prefix"]) as held:
            yield AdapterSource(id=held.id, folder=held.folder)


def _reply_of(found: Generation, **seconds: float) -> dict[str, Any]:
    return {
        "output": found.text,
        "tool_calls": [asdict(call) for call in found.tool_calls],
        "finish_reason": found.finish_reason,
        "usage": {
            "prompt_tokens": found.prompt_tokens,
            "image_tokens": found.image_tokens,
            "completion_tokens": found.completion_tokens,
            "cached_prompt_tokens": found.cached_prompt_tokens,
            "image_cached": found.image_cached,
        },
        "timing": {**seconds, "first_token_seconds": found.first_token_seconds},
    }


def _describe_error(error: Exception, *, memory_share: float | None = None) -> dict[str, Any]:
    """What the caller reads; the stack trace goes to the log and nowhere else.

    Args:
        error: What was raised.
        memory_share: Of the device's memory, which this worker may take; none for all of it.
    """
    if ran_out_of_memory(error):
        return _describe_lack(error, memory_share)
    faults = _faults_of(error)
    if faults:
        code = faults[0]["code"] if isinstance(error, InvalidConfig) else "chat_invalid"
        message = " ".join(fault["detail"] for fault in faults)
        return {"code": code, "category": "user", "message": message, "faults": faults}
    if isinstance(error, Interrupted):
        message = "The worker that was answering has stopped; send the request again."
        return {"code": "inference_worker_lost", "category": "system", "message": message}
    if isinstance(error, InvalidDataset):
        return {"code": "chat_invalid", "category": "user", "message": str(error)}
    known: dict[type[Exception], str] = {
        AdapterInvalid: "adapter_invalid",
        DeviceUnavailable: "device_unavailable",
        ModelUnavailable: "model_unavailable",
        ObjectMissing: "object_missing",  # the adapter was deleted after it was asked for
        StorageUnavailable: "storage_unavailable",
        StoreError: "adapter_unavailable",
    }
    for kind, code in known.items():
        if isinstance(error, kind):
            return {"code": code, "category": "system", "message": str(error)}
    _log.exception("inference_unexpected", exc_info=error)
    message = "The inference worker failed unexpectedly; its log says why."
    return {"code": "unexpected", "category": "system", "message": message}


def _describe_lack(error: Exception, share: float | None) -> dict[str, Any]:
    on_device = find_device_fault(error) is DeviceFault.OUT_OF_MEMORY
    _log.error("out_of_memory", on_device=on_device, reason=reason(error), memory_share=share)
    place = "device" if on_device else "machine"
    message = (
        f"The {place} of the inference worker has no memory left for the request. Send it again"
        " later, or make it smaller: fewer or smaller images, a shorter chat, a lower"
        " max_new_tokens."
    )
    if on_device and share is not None:
        message += (
            f" The worker may take {share:g} of the device's memory"
            " (GRIT_INFER_DEVICE_MEMORY_SHARE)."
        )
    code = "out_of_memory_device" if on_device else "out_of_memory_host"
    return {"code": code, "category": "system", "message": message}


def _faults_of(error: Exception) -> list[dict[str, str]]:
    """Return what is wrong with a request, each with its place in the payload."""
    if isinstance(error, (InvalidConfig, InvalidRecord)):
        found = error.faults if isinstance(error, InvalidConfig) else error.row_faults
        return [
            {"pointer": fault.pointer, "code": fault.code, "detail": fault.detail}
            for fault in found
        ]
    if isinstance(error, InvalidTurn):
        pointer = f"/messages/{error.turn}/content"
        return [{"pointer": pointer, "code": "chat_invalid", "detail": str(error)}]
    return []


_worker: InferenceWorker | None = None
_worker_lock = threading.Lock()


def inference_worker(device: str) -> InferenceWorker:
    """Return the inference worker of this process, made and started on first use."""
    global _worker  # noqa: PLW0603 - one process serves one device
    with _worker_lock:
        if _worker is None:
            _worker = InferenceWorker(Settings(), device=device)
            _worker.start()
        return _worker


@app.task(name=INFER_TASK, bind=True)  # type: ignore[untyped-decorator] # celery ships no types
def infer(task: Any, _request_id: str) -> None:
    """Answer what waits: the one that rang, or whoever's turn it is before."""
    inference_worker(_device_of(task)).serve()


def _device_of(task: Any) -> str:
    """The device of the queue that a task came through."""
    return str(task.request.delivery_info["routing_key"]).rpartition(".")[2]


def _on_ready(sender: Any, **_options: Any) -> None:
    """Load torch before the first request needs it, and look into the mailbox from then on."""
    queues = list(sender.app.amqp.queues.consume_from)
    if len(queues) == 1 and queues[0] in INFERENCE_QUEUES:
        inference_worker(queues[0].rpartition(".")[2])


def _on_shutting_down(**_options: Any) -> None:
    if _worker is not None:
        _worker.drain()


def _on_shutdown(**_options: Any) -> None:
    if _worker is not None:
        _worker.close()


signals.worker_ready.connect(_on_ready)
signals.worker_shutting_down.connect(_on_shutting_down)
signals.worker_shutdown.connect(_on_shutdown)
