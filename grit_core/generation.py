"""Answers from base models that stay loaded, with many adapters that share their steps.

Any number of threads ask at once. Each reads its own images, encodes its own chat and waits; one
thread of the engine's own runs the models. Between two steps it lets finished rows go and new ones
join, first come first served for each base model, so that requests for different adapters of one
base model are answered together and none waits for another's last token.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Empty
from typing import Final, TypeVar

import torch

from grit_core.adapter_folder import read_adapter_folder
from grit_core.device_memory import build_memory_error, release_frames, release_unused
from grit_core.errors import DeviceUnavailable, Interrupted, ModelUnavailable
from grit_core.library_errors import (
    is_device_failure,
    library_errors_as,
    ran_out_of_memory,
    reason,
)
from grit_core.models.torch_device import torch_device
from grit_core.serving.adapter_weights import AdapterWeights, load_adapter_weights
from grit_core.serving.answers import AdapterSource, EngineStats, Generation, GenerationRequest
from grit_core.serving.batch import MAX_KEY_BYTES, Batch
from grit_core.serving.constraint import MaskThread
from grit_core.serving.lone_answer import answer_alone
from grit_core.serving.request_encoding import (
    encode_request,
    explain_refused_chat,
    fit_request,
)
from grit_core.serving.resident_model import ResidentModel
from grit_core.serving.ticket import Ticket
from grit_core.serving.tool_answers import (
    AnswerPieces,
    faults_of_tools,
    hold_to_tools,
)
from grit_core.tools.call_reader import CallPiece

__all__ = ["AdapterSource", "EngineStats", "Generation", "GenerationEngine", "GenerationRequest"]

POLL_SECONDS: Final = 0.1
"""How often a waiting thread asks whether it should stop."""

PROMPT_TOKENS_BETWEEN_STEPS: Final = 512
"""New prompts go through the model until they have so many tokens; then the others go on."""


_log = logging.getLogger(__name__)

T = TypeVar("T")


class GenerationEngine:
    """Generates with base models and adapters kept in memory. Safe to share between threads."""

    def __init__(  # noqa: PLR0913 - every bound has a name of its own
        self,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_bases: int = 2,
        max_adapters: int = 16,
        max_batch: int = 16,
        max_rank: int = 256,
        max_adapter_bytes: int = 2 * 1024**3,
        max_key_bytes: int = MAX_KEY_BYTES,
        image_cache_bytes: int = 256 * 1024**2,
        prefix_cache_bytes: int = 256 * 1024**2,
    ) -> None:
        """Load nothing yet.

        Args:
            device: Where the models live; one that is not there raises `DeviceUnavailable`.
            dtype: `float32`, `bfloat16`, `float16`, or `auto` for what the device takes.
            max_bases: Base models kept in memory.
            max_adapters: Adapters in place beside each, and so at most in one batch.
            max_batch: Requests of a base model that share its steps.
            max_rank: Adapters of a larger rank are refused.
            max_adapter_bytes: Bound on the adapters' places beside each base model, and another
                on the copies in main memory, from which an adapter takes its place.
            max_key_bytes: Bound on the keys and values of the requests that share steps, for each
                base model; what the device has free bounds them too. A request waits until it
                fits. One that is the only one may take what the device has.
            image_cache_bytes: Bound on the image features kept for each base model; 0 for none.
            prefix_cache_bytes: Bound on the keys and values kept for each; 0 for none.
        """
        self._device = torch_device(device)
        self._dtype = dtype
        self._max_bases, self._max_adapters, self._max_batch = max_bases, max_adapters, max_batch
        self._max_rank, self._max_adapter_bytes = max_rank, max_adapter_bytes
        self._max_key_bytes = max_key_bytes
        self._image_cache_bytes = image_cache_bytes
        self._prefix_cache_bytes = prefix_cache_bytes
        self._door = threading.Lock()
        """Held while a base model or an adapter is found or loaded: first come, first served."""
        self._changed = threading.Condition()
        """Guards what follows; notified when there is work, or a base model is idle again."""
        self._bases: OrderedDict[str, ResidentModel] = OrderedDict()
        self._weights: OrderedDict[tuple[str, str], AdapterWeights] = OrderedDict()
        self._batches: dict[ResidentModel, Batch] = {}
        self._waiting: list[Ticket] = []
        self._masks = MaskThread()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._fault: Exception | None = None
        """What a device that failed for good raised."""
        self._turn = threading.Lock()
        """Held by the engine's thread while it runs models, and by a thread that drops one."""
        self._num_claims = 0
        """Threads that want the turn; the engine's thread begins no other pass before them."""

    @property
    def lost(self) -> str | None:
        """Why the device cannot be used by this process any more; none while it can.

        After an illegal access, a device-side assertion or a driver that failed, every call of the
        device fails. All requests then end with an error, and only a new process helps.
        """
        fault = self._fault
        return None if fault is None else reason(fault)

    def generate(
        self,
        source: str,
        request: GenerationRequest,
        *,
        adapter: AdapterSource | None = None,
        on_text: Callable[[str], None] | None = None,
        on_call: Callable[[CallPiece], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Answer with a base model, or with an adapter on it.

        Args:
            source: A local folder or hub id.
            request: What to answer.
            adapter: `None` for the base model as it is.
            on_text: Called in this thread with each new piece of the answer; the pieces joined are
                its text.
            on_call: Likewise with each new piece of a call of a tool.
            should_stop: Asked in this thread every `POLL_SECONDS`; true ends the request.

        A model or adapter that cannot be loaded raises `ModelUnavailable` or `AdapterInvalid`, a
        chat that the model's template refuses `InvalidDataset`, one that does not fit into the
        model's context or a grammar that it cannot be held to `InvalidConfig`, and a request that
        was stopped `Interrupted`. One for which the device has not enough memory, also after idle
        models and caches were dropped, raises `torch.OutOfMemoryError` (on the CPU `MemoryError`);
        the others go on. A device that failed for good raises its own error in all requests under
        way, and `DeviceUnavailable` from then on (see `lost`).
        """
        started = time.perf_counter()
        with self._door:
            resident = self._enter(source, should_stop)
        try:
            weights = None if adapter is None else self._load_adapter(source, resident, adapter)
            load_seconds = time.perf_counter() - started
            prompt = encode_request(resident, request)
            request = fit_request(request, prompt, resident)
            pieces = AnswerPieces(request, prompt.calls, on_text=on_text, on_call=on_call)
            with faults_of_tools(request):
                held = hold_to_tools(
                    request,
                    prompt.calls,
                    tokenizer=resident.encoder.tokenizer,
                    stop_token_ids=resident.stops_with(weights),
                )
                ticket = Ticket(held, prompt, resident, adapter=weights, load_seconds=load_seconds)
                self._submit(ticket)
                return _wait(ticket, pieces, should_stop)
        finally:
            with self._changed:
                resident.in_flight -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """End the engine's thread; requests under way raise `Interrupted`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        self._masks.close()

    def resident_adapters(self, source: str) -> tuple[str, ...]:
        """The adapters in place beside a base model, the least recently used first."""
        resident = self._bases.get(source)
        return () if resident is None else resident.slots.resident

    def stats(self) -> EngineStats:
        """Count what is held and what has been done."""
        with self._changed:
            bases, batches = list(self._bases.values()), list(self._batches.values())
            return EngineStats(
                num_active=sum(len(batch.tickets) for batch in batches),
                num_waiting=len(self._waiting),
                resident_adapters=sum(len(base.slots.resident) for base in bases),
                adapter_bytes=sum(base.slots.num_bytes for base in bases)
                + sum(weights.num_bytes for weights in self._weights.values()),
                cache_bytes=sum(batch.num_bytes for batch in batches)
                + sum(base.images.num_bytes + base.prefixes.num_bytes for base in bases),
                image_hits=sum(base.images.hits for base in bases),
                image_misses=sum(base.images.misses for base in bases),
                prefix_hits=sum(base.prefixes.hits for base in bases),
            )

    # --- in the threads that ask

    def _enter(self, source: str, should_stop: Callable[[], bool]) -> ResidentModel:
        """Find or load a base model, and keep it in memory for one request more.

        Raises:
            Interrupted: The caller did not want to wait for room any longer.
        """
        while True:
            with self._changed:
                self._refuse_if_over()
                resident = self._bases.get(source)
                if resident is not None:
                    self._bases.move_to_end(source)
                    resident.in_flight += 1
                    return resident
                if len(self._bases) < self._max_bases:
                    break
                if not self._idle():
                    if should_stop():
                        raise Interrupted(
                            "Stopped as asked, while waiting for a base model's place."
                        )
                    self._changed.wait(POLL_SECONDS)
                    continue
            with self._between_steps(should_stop):
                self._forget(self._idle()[:1])
        resident = self._load(source, should_stop)
        with self._changed:
            self._bases[source] = resident
            resident.in_flight += 1
            return resident

    def _load(self, source: str, should_stop: Callable[[], bool]) -> ResidentModel:
        """Load a base model; where it finds no memory, once more after room was made."""

        def load() -> ResidentModel:
            return ResidentModel.load(
                source,
                device=self._device,
                dtype=self._dtype,
                num_slots=self._max_adapters,
                max_adapter_bytes=self._max_adapter_bytes,
                image_cache_bytes=self._image_cache_bytes,
                prefix_cache_bytes=self._prefix_cache_bytes,
            )

        def make_room() -> None:
            with self._between_steps(should_stop):
                self._make_room()

        try:
            with library_errors_as(lambda error: _not_loaded(source, error)):
                return self._with_room(f"the model {source}", load, make_room=make_room)
        except Exception as error:
            release_frames(error)  # the weights may be among the variables
            if is_device_failure(error):
                self._lose(error)
            raise

    @contextmanager
    def _between_steps(self, should_stop: Callable[[], bool]) -> Iterator[None]:
        """Keep the engine's thread from running models in this block.

        Raises:
            Interrupted: The caller did not want to wait for a pass to end.
        """
        with self._changed:
            self._num_claims += 1
        try:
            while not self._turn.acquire(timeout=POLL_SECONDS):
                if should_stop():
                    raise Interrupted("Stopped as asked, while waiting for memory.")
            try:
                yield
            finally:
                self._turn.release()
        finally:
            with self._changed:
                self._num_claims -= 1
                self._changed.notify_all()

    def _load_adapter(
        self, source: str, resident: ResidentModel, adapter: AdapterSource
    ) -> AdapterWeights:
        """Return an adapter's matrices, read from disk when they are not in memory."""
        key = (source, adapter.id)
        with self._changed:
            found = self._weights.get(key)
            if found is not None:
                self._weights.move_to_end(key)
                return found
        header = read_adapter_folder(
            adapter.folder, max_rank=self._max_rank, max_bytes=self._max_adapter_bytes
        )
        weights = load_adapter_weights(
            adapter.folder,
            header,
            adapter_id=adapter.id,
            dtype=resident.dtype,
            linear_layers=resident.linear_layers,
        )
        with self._changed:
            self._weights[key] = weights
            held = sum(one.num_bytes for one in self._weights.values())
            while held > self._max_adapter_bytes and len(self._weights) > 1:
                held -= self._weights.popitem(last=False)[1].num_bytes
        return weights

    def _submit(self, ticket: Ticket) -> None:
        with self._changed:
            self._refuse_if_over()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
            self._waiting.append(ticket)
            self._changed.notify_all()

    def _refuse_if_over(self) -> None:
        """Take nothing, and load nothing, once the engine closes or its device failed for good.

        Raises:
            Interrupted: The engine closes.
            DeviceUnavailable: The device has failed.
        """
        if self._closing:
            raise Interrupted("The engine is closing.")
        if self._fault is not None:
            raise DeviceUnavailable(
                f"The device {self._device} failed, and this process cannot use it any more:"
                f" {reason(self._fault)}. Start the process again."
            ) from self._fault

    def _lose(self, error: Exception) -> None:
        """Take nothing more: the device failed for good."""
        _log.error("the device %s failed for good: %s", self._device, reason(error))
        release_frames(error)
        with self._changed:
            self._fault = error
            self._changed.notify_all()

    # --- memory; in the turn

    def _idle(self) -> list[str]:
        """The base models that no request needs, the least recently used first."""
        with self._changed:
            return [source for source, base in self._bases.items() if not base.in_flight]

    def _forget(self, sources: Iterable[str]) -> None:
        """Drop base models, and give their memory back to the device."""
        for source in sources:
            with self._changed:
                resident = self._bases.pop(source, None)
                if resident is None:
                    continue
                self._batches.pop(resident, None)
            resident.unload()
        release_unused(self._device)

    def _make_room(self) -> None:
        """Drop what no request needs: idle base models, caches, and room that no row needs."""
        idle = self._idle()
        _log.warning(
            "the device %s has no memory left; dropping %s", self._device, idle or "caches"
        )
        with self._changed:
            batches = list(self._batches.values())
        self._drop_caches()
        for batch in batches:
            batch.trim()
        self._forget(idle)

    def _drop_caches(self) -> None:
        with self._changed:
            bases = list(self._bases.values())
        for base in bases:
            base.drop_caches()

    def _with_room(
        self,
        what: str,
        work: Callable[[], T],
        *,
        make_room: Callable[[], None] | None = None,
        may_repeat: Callable[[], bool] = lambda: True,
    ) -> T:
        """Work; where memory runs out, make room and try once more.

        Args:
            what: For the error: what memory is needed for.
            work: Changes nothing where memory runs out.
            make_room: How.
            may_repeat: Asked after the first failure.

        Memory that is not enough after that raises what `build_memory_error` makes.
        """
        for again in (False, True):
            if again:  # not inside of `except`: this try must find what the first one held
                (make_room or self._make_room)()
                if not may_repeat():
                    break
            try:
                return work()
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                lack = build_memory_error(self._device, what, error)
        raise lack

    # --- in the engine's thread

    def _run(self) -> None:
        ending: Exception = Interrupted("The engine is closing.")
        try:
            # All of it: what a step has made may not be changed outside of the mode.
            with torch.inference_mode():
                while self._has_work():
                    with self._turn:
                        self._pass()
        except Exception as error:  # noqa: BLE001 - all that wait are given it
            ending = error
            if is_device_failure(error):
                self._lose(error)
            else:
                # No one may wait for a thread that is gone; the next request starts another.
                _log.exception("the engine's thread failed")
        with self._changed:
            self._thread = None
            if self._fault is not None:
                ending = self._fault
            for ticket in self._waiting:
                ticket.fail(ending)
            self._waiting.clear()
            batches, self._batches = list(self._batches.values()), {}
            if not isinstance(ending, Interrupted):
                self._bases.clear()  # in what state they are is not known
        for batch in batches:
            batch.fail(ending)

    def _has_work(self) -> bool:
        """Wait for something to do; false when the engine is closing or the device lost."""
        with self._changed:
            while not (self._closing or self._fault is not None):
                if not self._num_claims and (self._waiting or self._running()):
                    return True
                self._changed.wait()
            return False

    def _pass(self) -> None:
        """Let rows leave and join, and choose one more token for each.

        What it refers to is gone when it returns: a thread that waits must hold no model.
        """
        for batch in self._running():
            self._drop_stopped(batch)
        self._admit()
        for batch in self._running():
            self._step(batch)

    def _running(self) -> list[Batch]:
        return [batch for batch in list(self._batches.values()) if batch.tickets]

    def _admit(self) -> None:
        """Let waiting requests in, in their order; one that has to wait holds up its own base."""
        left = PROMPT_TOKENS_BETWEEN_STEPS
        full: set[ResidentModel] = set()
        with self._changed:
            waiting = list(self._waiting)
        for ticket in waiting:
            if left <= 0:
                break
            if ticket.stopped:
                self._withdraw(ticket)
            elif ticket.resident not in full:
                if self._begin(ticket):
                    left -= len(ticket.prompt_ids)
                else:
                    full.add(ticket.resident)

    def _begin(self, ticket: Ticket) -> bool:
        """Run a prompt and let its row join; false while there is no room for it."""
        resident = ticket.resident
        with self._changed:
            batch = self._batches.get(resident)
            if batch is None:
                batch = self._batches[resident] = Batch(
                    resident,
                    masks=self._masks,
                    max_rows=self._max_batch,
                    max_key_bytes=self._max_key_bytes,
                )
        try:
            if not self._has_room(batch, ticket):
                return False
            if ticket.adapter is not None:
                acquire = partial(resident.slots.acquire, ticket.adapter)
                ticket.slot = self._with_room(f"the adapter {ticket.adapter.id}", acquire)
                if ticket.slot is None:
                    return False
            self._withdraw(ticket)
            if resident.shares(ticket.num_tokens):
                self._prefill(ticket, batch)
            else:
                self._answer_alone(ticket, batch)
        except Exception as error:
            self._withdraw(ticket)
            batch.release(ticket)
            ticket.fail(error)
            if is_device_failure(error):
                raise
        return True

    def _has_room(self, batch: Batch, ticket: Ticket) -> bool:
        """Whether a request may join now. Caches give way to it; rows and idle models do not."""
        if not batch.has_room(ticket):
            return False
        missing = batch.count_missing_bytes(ticket)
        if missing == 0:
            return True
        with self._changed:
            cached = sum(base.cache_bytes for base in self._bases.values())
        if cached < missing:  # it waits for rows: they may go on using what is kept
            return False
        self._drop_caches()
        return batch.count_missing_bytes(ticket) == 0

    def _prefill(self, ticket: Ticket, batch: Batch) -> None:
        """Run a prompt, choose the first token and let the row join."""
        run = partial(
            ticket.resident.prefill, ticket.prompt, slot=ticket.slot, adapter=ticket.adapter
        )
        with library_errors_as(explain_refused_chat):
            prefilled = self._with_room(f"a prompt of {len(ticket.prompt_ids)} tokens", run)
        ended = self._with_room(
            "the first token of an answer",
            lambda: ticket.begin(prefilled),
            may_repeat=lambda: not ticket.ids,
        )
        if ended:
            batch.release(ticket)
            ticket.finish()
        else:
            what = f"the keys and values of {len(batch.tickets) + 1} requests"
            self._with_room(what, partial(batch.join, ticket, prefilled))

    def _answer_alone(self, ticket: Ticket, batch: Batch) -> None:
        """Answer a request that cannot share steps, from its first token to its last."""
        with library_errors_as(explain_refused_chat):
            # With a token it has begun: the caller may have read it.
            self._with_room(
                f"an answer to a prompt of {len(ticket.prompt_ids)} tokens",
                partial(answer_alone, ticket),
                may_repeat=lambda: not ticket.ids,
            )
        batch.release(ticket)
        ticket.finish()

    def _drop_stopped(self, batch: Batch) -> None:
        try:
            batch.drop_stopped()
        except Exception as error:
            if is_device_failure(error):
                raise
            batch.fail(error)

    def _step(self, batch: Batch) -> None:
        """Choose one more token for every row.

        Where memory runs out, the step is made again after room was made. Where it still runs out,
        the longest row ends with the error, and the others try again: each row that goes gives them
        what it held.
        """
        made_room = False
        try:
            while batch.tickets:
                batch.mark()
                try:
                    batch.step()
                except Exception as error:
                    if not ran_out_of_memory(error):
                        raise
                    what = f"the next tokens of {len(batch.tickets)} answers"
                    lack = build_memory_error(self._device, what, error)
                else:
                    return
                batch.recover()
                if made_room and batch.tickets:
                    batch.shed(lack)
                self._make_room()
                made_room = True
        except Exception as error:
            if is_device_failure(error):
                raise
            batch.fail(error)  # half a step is in the keys now

    def _withdraw(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)


def _wait(ticket: Ticket, pieces: AnswerPieces, should_stop: Callable[[], bool]) -> Generation:
    """Hand pieces on until the answer is whole; what went wrong with it is raised here.

    Raises:
        Interrupted: The caller wants to stop.
    """
    asked = time.monotonic()
    try:
        while True:
            try:
                item = ticket.outbox.get(timeout=POLL_SECONDS)
            except Empty:
                item = ""
            if isinstance(item, Generation):
                return pieces.finish(item)
            if isinstance(item, Exception):
                raise item
            if item:
                pieces.add(item)
            if time.monotonic() - asked >= POLL_SECONDS:
                asked = time.monotonic()
                if should_stop():
                    raise Interrupted("Stopped as asked.")
    finally:
        ticket.stopped = True


def _not_loaded(source: str, error: Exception) -> ModelUnavailable:
    return ModelUnavailable(f"The model {source} cannot be loaded: {reason(error)}")
