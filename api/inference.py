"""From an inference request to the worker's answer: what to ask, whom to ask, how long to wait."""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from anyio import CancelScope, to_thread
from fastapi import Request
from sqlalchemy.orm import Session

from api.devices import DEVICE_SEEN_SECONDS
from api.errors import InvalidRequest, Item, Problem
from api.intake.conversation import Conversation, names_urls
from api.intake.remote_images import RemoteImages, fetch_limiter
from api.intake.tools import build_tool_use
from api.model_names import describe_wrong_model
from api.presentation import describe_unready
from api.schemas.infer import InferAnswer, InferRequest
from api.schemas.tools import ToolCallDelta
from api.services import Services
from api.waiting import PLACES
from grit_core.config.devices import DeviceStrategy, choose_device
from grit_core.grammars import json_schema_grammar
from store import adapters, base_models, jobs, workers
from store.database import transaction
from store.errors import QueueFull
from store.ids import new_id
from store.models import Adapter, ModelStatus
from store.queue import INFERENCE_QUEUES

_SLICE_SECONDS: Final = 1.0
"""After so long a silence, we look whether the worker lives."""
_LOOK_SECONDS: Final = 0.5
"""How often we look whether the caller is still there."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What goes into the mailbox, and for which device."""

    id: str
    team: str
    device: str
    model: str
    adapter: str | None
    payload: dict[str, Any]
    places: tuple[str, ...]
    """Where in the request each message of the payload was written, as a JSON pointer."""


async def prepare(
    services: Services, team: str, body: InferRequest, *, grammar: str = ""
) -> Question:
    """Check everything that a request names or holds; what is wrong is raised as a `Problem`.

    Args:
        services: What the request is checked against.
        team: Who asks.
        body: The request.
        grammar: What the answer is held to where the request has no schema.
    """
    fetches = bool(services.settings.remote_image_hosts) and names_urls(body)
    limiter = fetch_limiter() if fetches else None
    return await to_thread.run_sync(_prepare, services, team, body, grammar, limiter=limiter)


def _prepare(services: Services, team: str, body: InferRequest, grammar: str) -> Question:
    if body.answer_schema is not None:
        grammar = json_schema_grammar(body.answer_schema, pointer="/schema")
    remote = RemoteImages(
        services.settings.remote_image_hosts, seconds=services.settings.remote_image_seconds
    )
    most = services.settings.infer_max_new_tokens
    if body.max_new_tokens is not None and body.max_new_tokens > most:
        raise InvalidRequest([_too_long(body.max_new_tokens, most)])
    conversation = Conversation(body, remote=remote)
    messages = conversation.messages()
    tools = build_tool_use(body)
    with transaction(services.engine, read_only=True) as session:
        adapter = _adapter(session, team, body)
        if adapter is not None and body.model not in {None, adapter.model}:
            detail = f"The adapter belongs to {adapter.model!r}; leave `model` out."
            item = Item(code="adapter_mismatch", detail=detail, pointer="/model", input=body.model)
            raise InvalidRequest([item])
        model = _model(session, team, adapter.model if adapter is not None else body.model or "")
        device = _device(session, live_seconds=services.settings.worker_seen_seconds)
    request_id = new_id("inf")
    payload = {
        "id": request_id,
        "model": {"id": model.id, "source": model.source},
        "adapter": None if adapter is None else {"id": adapter.id, "prefix": adapter.prefix},
        "messages": messages,
        "max_new_tokens": most if body.max_new_tokens is None else body.max_new_tokens,
        "shorten_to_fit": body.max_new_tokens is None,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "stop": body.stop,
        "grammar": grammar,
        "tools": tools,
        "stream": body.stream,
        "submitted_at": time.time(),
    }
    return Question(
        id=request_id,
        team=team,
        device=device,
        model=model.id,
        adapter=None if adapter is None else adapter.id,
        payload=payload,
        places=conversation.places,
    )


def _too_long(wanted: int, most: int) -> Item:
    detail = (
        f"An answer has at most {most} tokens here (GRIT_INFER_MAX_NEW_TOKENS), and {wanted} are"
        " asked for. Lower the bound, or leave it out for as many as fit."
    )
    return Item(code="out_of_range", detail=detail, pointer="/max_new_tokens", input=wanted)


def _adapter(session: Session, team: str, body: InferRequest) -> Adapter | None:
    if body.adapter is not None:
        return adapters.get_adapter(session, body.adapter, team=team)
    if body.job is None:
        return None
    job = jobs.get_job(session, body.job, team=team)
    found = adapters.adapter_of_job(session, job.id, team=team)
    if found is None:
        detail = f"The job is {job.status} and has no adapter yet."
        item = Item(code="adapter_not_ready", detail=detail, pointer="/job", input=job.id)
        raise Problem("adapter_not_ready", detail, errors=[item])
    return found


def _model(session: Session, team: str, model_id: str) -> Any:
    row = base_models.find_existing(session, model_id)
    if row is None:
        detail = describe_wrong_model(session, team, model_id)
        item = Item(code="model_not_found", detail=detail, pointer="/model", input=model_id)
        raise InvalidRequest([item])
    if row.status != ModelStatus.READY:
        detail = describe_unready(row)
        item = Item(code="model_not_ready", detail=detail, pointer="/model", input=model_id)
        raise Problem("model_not_ready", detail, errors=[item])
    return row


def _device(session: Session, *, live_seconds: float) -> str:
    """Return the best device that a worker answers on, or did lately: workers restart.

    Raises:
        Problem: No worker did.
    """
    live = workers.live_queues(session, seen_within_seconds=live_seconds)
    seen = workers.live_workers(session, seen_within_seconds=DEVICE_SEEN_SECONDS)
    for queues in (live, {queue for worker in seen for queue in worker.queues}):
        served = tuple(name.removeprefix("infer.") for name in INFERENCE_QUEUES if name in queues)
        if served:
            return choose_device(DeviceStrategy.AUTO_INFERENCE, served).device
    raise Problem("no_inference_worker", "No inference worker is live; start one, or wait.")


# --- the mailbox


async def ask(services: Services, request: Request, question: Question) -> dict[str, Any]:
    """Put a question into the mailbox and wait for its answer.

    Raises:
        Problem: If no answer comes in time, its worker dies, or the caller went away.
    """
    async with aclosing(_messages_of(services, request, question)) as messages:
        async for message in messages:
            if "delta" not in message:
                return message
    raise Problem("inference_broken", "The answer ended without its last message.")


Piece = str | ToolCallDelta | InferAnswer
"""More of an answer's text, more of one of its calls, or the whole answer."""


async def stream(services: Services, request: Request, question: Question) -> AsyncGenerator[Piece]:
    """Put a question into the mailbox; yield its answer's pieces, then the whole answer.

    The pieces of text, joined, are the answer's `output`, and those of a call its arguments.
    Closing the generator cancels the request. What goes wrong raises `Problem` as in `ask` and
    `answer_of`, before the first piece or after it.
    """
    sent = _Sent(question)
    async with aclosing(_messages_of(services, request, question)) as messages:
        async for message in messages:
            if "delta" in message:
                for piece in sent.take(message):
                    yield piece
                continue
            answer = answer_of(question, message)
            for piece in sent.rest(answer):
                yield piece
            yield answer


class _Sent:
    """What has been sent of one answer; the end makes up for what was lost on the way."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._text = ""
        self._calls: list[tuple[str, str]] = []
        """Names and arguments."""

    def take(self, message: dict[str, Any]) -> Iterator[Piece]:
        """Yield what of a worker's message comes right after what was sent."""
        call = message.get("call")
        if call is None:
            piece = _following(message, len(self._text))
            self._text += piece
            if piece:
                yield piece
        elif call["index"] <= len(self._calls):
            yield from self._add_call(call["index"], call["name"], message)

    def rest(self, answer: InferAnswer) -> Iterator[Piece]:
        """Yield what was not sent of an answer.

        Raises:
            Problem: What was sent is not the beginning of it.
        """
        calls = [(call.function.name, call.function.arguments) for call in answer.tool_calls or []]
        begun = zip(self._calls, calls, strict=False)
        agrees = len(self._calls) <= len(calls) and all(
            name == whole_name and whole.startswith(arguments)
            for (name, arguments), (whole_name, whole) in begun
        )
        if not (agrees and answer.output.startswith(self._text)):
            detail = "The pieces that were sent are not the beginning of the answer."
            raise Problem("inference_broken", detail)
        if len(answer.output) > len(self._text):
            yield answer.output[len(self._text) :]
        for index, (name, arguments) in enumerate(calls):
            num_sent = len(self._calls[index][1]) if index < len(self._calls) else 0
            message = {"delta": arguments[num_sent:], "at": num_sent}
            yield from self._add_call(index, name, message)

    def _add_call(self, index: int, name: str, message: dict[str, Any]) -> Iterator[ToolCallDelta]:
        id_ = call_id(self._question, index)
        if index == len(self._calls):
            self._calls.append((name, ""))
            yield ToolCallDelta(index=index, id=id_, name=name, arguments="")
        name, arguments = self._calls[index]
        piece = _following(message, len(arguments))
        if piece:
            self._calls[index] = name, arguments + piece
            yield ToolCallDelta(index=index, id=id_, name=name, arguments=piece)


def call_id(question: Question, index: int) -> str:
    """Return the id of a call in an answer."""
    return f"call_{question.id}_{index}"


def _following(message: dict[str, Any], num_sent: int) -> str:
    """Return what of a piece comes right after the characters sent; the end makes up for a gap."""
    at = int(message.get("at", num_sent))
    return "" if at > num_sent else str(message["delta"])[num_sent - at :]


async def _messages_of(
    services: Services, request: Request, question: Question
) -> AsyncGenerator[dict[str, Any]]:
    """Submit a question and yield the messages of its answer up to the last one.

    Raises:
        Problem: If there is silence for too long, the worker dies, or the caller went away.
        QueueFull: If as many wait already as may.
    """
    mailbox = services.mailbox
    seconds = services.settings.infer_timeout_seconds
    ended = False
    with PLACES.one():
        try:
            await to_thread.run_sync(_submit, services, question)
            heard_at = looked_at = time.monotonic()
            while not ended:
                wait = min(_SLICE_SECONDS, heard_at + seconds - time.monotonic())
                message = await mailbox.wait_async(question.id, timeout_seconds=max(0.01, wait))
                now = time.monotonic()
                if message is not None:
                    heard_at, ended = now, "delta" not in message
                    yield message
                elif await mailbox.is_lost_async(question.id):
                    detail = "The worker that was answering has died; send the request again."
                    raise Problem("inference_worker_lost", detail)
                elif now - heard_at >= seconds:
                    raise Problem(
                        "inference_timeout", f"Nothing was heard for {seconds:g} seconds."
                    )
                if now - looked_at >= _LOOK_SECONDS and not ended:
                    looked_at = now
                    if await request.is_disconnected():
                        raise Problem("client_gone", "The caller closed the connection.")
        except QueueFull:
            ended = True  # it never was in the mailbox
            raise
        finally:
            if not ended:
                with CancelScope(shield=True):
                    await to_thread.run_sync(mailbox.cancel, question.id)


def _submit(services: Services, question: Question) -> None:
    services.mailbox.submit(
        question.id, device=question.device, team=question.team, payload=question.payload
    )


def _place_in_request(question: Question, pointer: str) -> str:
    """Return where the caller wrote what a worker points at in the payload's messages."""
    step, _, rest = pointer.removeprefix("/messages").removeprefix("/").partition("/")
    if not pointer.startswith("/messages"):
        return pointer
    if question.places == ("/prompt",):
        return "/prompt"
    if not (step.isdecimal() and int(step) < len(question.places)):
        return pointer
    return "/".join(filter(None, (question.places[int(step)], rest)))


class _WorkerProblem(NamedTuple):
    code: str
    detail: str = ""
    """Empty: in the worker's words."""


_PROBLEMS: Final = {
    problem.code: problem
    for problem in (
        _WorkerProblem("object_missing", "The adapter was deleted while it was asked."),
        _WorkerProblem("storage_unavailable", "The adapter could not be fetched; try again later."),
        _WorkerProblem("inference_worker_lost"),
        _WorkerProblem("out_of_memory_device"),
        _WorkerProblem("out_of_memory_host"),
    )
}
"""Errors of a worker that are problems of their own."""


def answer_of(question: Question, reply: dict[str, Any]) -> InferAnswer:
    """Return a worker's reply as an answer.

    Raises:
        Problem: If the worker could not answer.
    """
    error = reply.get("error")
    own = _PROBLEMS.get(str(error.get("code"))) if error is not None else None
    if error is not None and own is not None:
        raise Problem(own.code, own.detail or str(error["message"]))
    if error is not None:
        code = "inference_failed" if error.get("category") == "user" else "inference_broken"
        detail = str(error.get("message", "The worker gave no reason."))
        items = [
            Item(
                code=str(fault["code"]),
                detail=str(fault["detail"]),
                pointer=_place_in_request(question, str(fault["pointer"])),
            )
            for fault in error.get("faults", ())
        ]
        raise Problem(
            code, detail, errors=items or [Item(code=str(error.get("code", code)), detail=detail)]
        )
    return InferAnswer.model_validate({
        "id": question.id,
        "model": question.model,
        "adapter": question.adapter,
        "output": reply["output"],
        "tool_calls": [
            {"id": call_id(question, index), "function": call}
            for index, call in enumerate(reply.get("tool_calls") or [])
        ]
        or None,
        "finish_reason": reply["finish_reason"],
        "usage": reply["usage"],
        "timing": reply.get("timing") or {},
    })
