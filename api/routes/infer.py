"""Inference: a request goes through the mailbox to a worker, and its answer comes back."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import structlog
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.errors import problem_document, problem_of, request_id_of
from api.inference import Piece, answer_of, ask, prepare, stream
from api.pointers import pointing_into
from api.routing import ServiceRouter
from api.schemas.infer import InferAnswer, InferDelta, InferRequest
from api.schemas.tools import ToolCallDelta
from api.waiting import kept_alive
from store.keys import Scope

router = ServiceRouter("inference")
log = structlog.get_logger(__name__)

HEARTBEAT_SECONDS: Final = 10.0
_HEARTBEAT: Final = b": keep-alive\n\n"
_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The answer; or, with `stream: true`, Server-Sent Events: `delta` with a"
        " piece of text (`InferDelta`) any number of times, `tool_call` with a piece of a call"
        " (`ToolCallDelta`) likewise, then `done` with the whole answer (`InferAnswer`). What goes"
        " wrong after the first piece is an event `error` with a problem document, which ends the"
        " stream. The pieces of text joined are the answer's `output`, and those of a call its"
        " arguments.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
}


@router.post(
    "/infer",
    response_model=InferAnswer,
    responses={
        **_STREAM,
        **problems(
            "not_found",
            "object_missing",
            "adapter_not_ready",
            "model_not_ready",
            "inference_failed",
            "inference_broken",
            "inference_timeout",
            "inference_worker_lost",
            "out_of_memory_device",
            "out_of_memory_host",
            "no_inference_worker",
            "queue_full",
            "too_many_waiting",
            "queue_unavailable",
        ),
    },
)
@requires(Scope.INFER)
async def infer(
    request: Request, body: InferRequest, caller: CallerDep, services: ServicesDep
) -> Response | InferAnswer:
    """Answer with a base model, or with an adapter over it; whole, or piece by piece."""
    with pointing_into(await request.json()):
        question = await prepare(services, caller.team, body)
        if not body.stream:
            return answer_of(question, await ask(services, request, question))
        pieces = stream(services, request, question)
        # Whatever fails before there is a piece is an ordinary answer.
        first = await anext(pieces)
    return EventStream(_events(request, first, pieces), source=pieces)


class EventStream(StreamingResponse):
    """Server-sent events, whose source is closed as soon as nobody reads them any more."""

    def __init__(self, events: AsyncGenerator[bytes], *, source: AsyncGenerator[Piece]) -> None:
        headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._source = events, source

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Send the events."""
        # Both: events that were never asked for have not begun to read their source.
        async with aclosing(self._source), aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _events(
    request: Request, first: Piece, pieces: AsyncGenerator[Piece]
) -> AsyncGenerator[bytes]:
    async with aclosing(kept_alive(pieces, silence_seconds=HEARTBEAT_SECONDS)) as following:
        yield _event(first)
        try:
            async for piece in following:
                yield _HEARTBEAT if piece is None else _event(piece)
        except Exception as error:  # noqa: BLE001 - the answer has begun: whatever it is, it is told
            problem = problem_of(error)
            log.warning("stream_failed", code=problem.code, reason=str(error))
            document = problem_document(problem, request_id_of(request))
            yield _frame("error", bytes(document.body))


def _event(piece: Piece) -> bytes:
    if isinstance(piece, str):
        return _frame("delta", InferDelta(text=piece).model_dump_json().encode())
    if isinstance(piece, ToolCallDelta):
        return _frame("tool_call", piece.model_dump_json().encode())
    return _frame("done", piece.model_dump_json().encode())


def _frame(event: str, data: bytes) -> bytes:
    # One line of data: JSON escapes the line ends inside of texts.
    return b"event: " + event.encode() + b"\ndata: " + data + b"\n\n"
