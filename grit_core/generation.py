"""Answers from base models that stay loaded, with many adapters that share their steps.

Any number of threads ask at once. Each reads its own images, encodes its own chat and waits; one
thread of the engine's own runs the models. Between two steps it lets finished rows go and new ones
join, first come first served for each base model, so that requests for different adapters of one
base model are answered together and none waits for another's last token.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import Empty
from typing import Final

import torch
from PIL import Image

from grit_core.adapter_folder import read_adapter_folder
from grit_core.data.encoder import ChatEncoder
from grit_core.data.image_decoding import decode_image
from grit_core.errors import (
    Fault,
    Interrupted,
    InvalidConfig,
    InvalidDataset,
    ModelUnavailable,
)
from grit_core.library_errors import library_errors_as, reason
from grit_core.models.torch_device import torch_device
from grit_core.records import Role
from grit_core.serving.adapter_weights import AdapterWeights, load_adapter_weights
from grit_core.serving.answers import AdapterSource, EngineStats, Generation, GenerationRequest
from grit_core.serving.batch import MAX_KEY_BYTES, Batch
from grit_core.serving.constraint import MaskThread
from grit_core.serving.lone_answer import answer_alone
from grit_core.serving.resident_model import Prompt, ResidentModel
from grit_core.serving.ticket import Ticket
from grit_core.serving.tool_answers import (
    AnswerPieces,
    faults_of_tools,
    find_hidden_token_ids,
    hold_to_tools,
)
from grit_core.tools.call_format import CallFormat
from grit_core.tools.call_reader import CallPiece

__all__ = ["AdapterSource", "EngineStats", "Generation", "GenerationEngine", "GenerationRequest"]

POLL_SECONDS: Final = 0.1
"""How often a waiting thread asks whether it should stop."""

PROMPT_TOKENS_BETWEEN_STEPS: Final = 512
"""New prompts go through the model until they have so many tokens; then the others go on."""


_log = logging.getLogger(__name__)


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
            max_key_bytes: Bound on the keys and values of the requests that share the steps of a
                base model; one request may have more.
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
        was stopped `Interrupted`.
        """
        started = time.perf_counter()
        with self._door:
            resident = self._enter(source, should_stop)
        try:
            weights = None if adapter is None else self._load_adapter(source, resident, adapter)
            load_seconds = time.perf_counter() - started
            prompt = _encode(resident, request)
            request = _fitted(request, prompt, resident)
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
        with self._changed:
            while source not in self._bases and len(self._bases) >= self._max_bases:
                idle = next((s for s, base in self._bases.items() if not base.in_flight), None)
                if idle is not None:
                    self._forget(idle)
                elif should_stop():
                    raise Interrupted("Stopped as asked, while waiting for a base model's place.")
                else:
                    self._changed.wait(POLL_SECONDS)
            resident = self._bases.get(source)
            if resident is not None:
                self._bases.move_to_end(source)
                resident.in_flight += 1
                return resident
        with library_errors_as(lambda error: _not_loaded(source, error)):
            resident = ResidentModel.load(
                source,
                device=self._device,
                dtype=self._dtype,
                num_slots=self._max_adapters,
                max_adapter_bytes=self._max_adapter_bytes,
                image_cache_bytes=self._image_cache_bytes,
                prefix_cache_bytes=self._prefix_cache_bytes,
            )
        with self._changed:
            self._bases[source] = resident
            resident.in_flight += 1
            return resident

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
            if self._closing:
                raise Interrupted("The engine is closing.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
            self._waiting.append(ticket)
            self._changed.notify_all()

    def _forget(self, source: str) -> None:
        resident = self._bases.pop(source)
        self._batches.pop(resident, None)

    # --- in the engine's thread

    def _run(self) -> None:
        ending: Exception = Interrupted("The engine is closing.")
        try:
            # All of it: what a step has made may not be changed outside of the mode.
            with torch.inference_mode():
                while self._has_work():
                    for batch in self._running():
                        batch.drop_stopped()
                    self._admit()
                    for batch in self._running():
                        self._step(batch)
        except Exception as error:  # noqa: BLE001 - it is told to all that wait
            # Nobody may wait for a thread that is gone; the next request starts another.
            _log.exception("the engine's thread failed")
            ending = error
        with self._changed:
            self._thread = None
            for ticket in self._waiting:
                ticket.fail(ending)
            self._waiting.clear()
            batches, self._batches = list(self._batches.values()), {}
            if not isinstance(ending, Interrupted):
                self._bases.clear()  # in what state they are is not known
        for batch in batches:
            for ticket in batch.tickets:
                ticket.fail(ending)

    def _has_work(self) -> bool:
        """Wait for something to do; false when the engine is closing."""
        with self._changed:
            while not (self._closing or self._waiting or self._running()):
                self._changed.wait()
            return not self._closing

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
        if not batch.has_room(ticket):
            return False
        try:
            if ticket.adapter is not None:
                ticket.slot = resident.slots.acquire(ticket.adapter)
                if ticket.slot is None:
                    return False
            self._withdraw(ticket)
            if not resident.shares(ticket.num_tokens):
                with library_errors_as(_chat_refused):
                    answer_alone(ticket)
                batch.release(ticket)
                ticket.finish()
                return True
            with library_errors_as(_chat_refused):
                prefilled = resident.prefill(
                    ticket.prompt, slot=ticket.slot, adapter=ticket.adapter
                )
            if ticket.begin(prefilled):
                batch.release(ticket)
                ticket.finish()
            else:
                batch.join(ticket, prefilled)
        except Exception as error:  # noqa: BLE001 - whatever it is, the one that waits is told
            self._withdraw(ticket)
            batch.release(ticket)
            ticket.fail(error)
        return True

    def _step(self, batch: Batch) -> None:
        try:
            batch.step()
        except Exception as error:  # noqa: BLE001 - as above; half a step is in the keys now
            batch.fail(error)

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


def _encode(resident: ResidentModel, request: GenerationRequest) -> Prompt:
    """Read the images and write the chat as the model reads it."""
    images = [decode_image(data, index=i) for i, data in enumerate(request.chat.images)]
    # Tokenizers are not made to be shared by two threads.
    with resident.encoding, library_errors_as(_chat_refused):
        inputs, calls = _encode_chat(resident.encoder, request, images)
    return Prompt(
        inputs=inputs,
        calls=calls,
        hidden_token_ids=(
            None
            if calls is None or request.tools is None
            else find_hidden_token_ids(resident.encoder.tokenizer, calls)
        ),
        images=tuple(hashlib.sha256(data).hexdigest() for data in request.chat.images),
        image_tokens=int(
            torch.isin(inputs["input_ids"], resident.encoder.image_token_ids).sum().item()
        ),
    )


def _fitted(
    request: GenerationRequest, prompt: Prompt, resident: ResidentModel
) -> GenerationRequest:
    """Return a request whose answer fits into the model's context after its prompt.

    The sentences are those of OpenAI and others: clients look for their words (LiteLLM for
    "maximum context length", LangChain for "prompt is too long") to cut a chat and ask again.

    Raises:
        InvalidConfig: The prompt leaves no room for an answer, or not for one that was asked for.
    """
    most, wanted = resident.max_positions, request.max_new_tokens
    prompt_tokens = len(prompt.ids_T)
    if most is None or prompt_tokens + wanted <= most:
        return request
    room = most - prompt_tokens
    if room > 0 and request.shorten_to_fit:
        return replace(request, max_new_tokens=room)
    if room > 0:
        pointer, what = "/max_new_tokens", "messages or the completion"
        asked = (
            f"you requested {prompt_tokens + wanted} tokens ({prompt_tokens} in the messages,"
            f" {wanted} in the completion): the prompt is too long for such an answer"
        )
    else:
        pointer, what = "/messages", "messages"
        asked = f"your messages resulted in {prompt_tokens} tokens: the prompt is too long"
    detail = (
        f"This model's maximum context length is {most} tokens. However, {asked}."
        f" Please reduce the length of the {what}."
    )
    raise InvalidConfig([Fault(pointer=pointer, code="request_too_large", detail=detail)])


def _encode_chat(
    encoder: ChatEncoder, request: GenerationRequest, images: Sequence[Image.Image]
) -> tuple[dict[str, torch.Tensor], CallFormat | None]:
    """Return the model's arguments, and how the answer writes calls where the chat has tools."""
    messages = request.chat.messages
    if request.tools is None and not any(
        message.tool_calls or message.role is Role.TOOL for message in messages
    ):
        return encoder.encode_prompt(messages, images), None
    tools = () if request.tools is None else request.tools.tools
    return encoder.encode_tool_prompt(messages, images, tools)


def _chat_refused(error: Exception) -> InvalidDataset:
    return InvalidDataset(
        f"the model or its processor refuses the chat: {reason(error)}; look at its images and at"
        " the order of its messages"
    )


def _not_loaded(source: str, error: Exception) -> ModelUnavailable:
    return ModelUnavailable(f"The model {source} cannot be loaded: {reason(error)}")
