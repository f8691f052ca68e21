"""A chat completion as server-sent events."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import structlog
from fastapi import Request

from api.errors import Problem, problem_of
from api.inference import Piece, Question, stream
from api.openai.errors import error_of
from api.openai.schemas.chat import ChatUsage
from api.routes.infer import HEARTBEAT_SECONDS, EventStream
from api.schemas.infer import InferAnswer
from api.schemas.tools import ToolCallDelta
from api.services import Services
from api.waiting import kept_alive

log = structlog.get_logger(__name__)

_HEARTBEAT: Final = b": keep-alive\n\n"
_DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """What all chunks of one answer have in common."""

    id: str
    model: str
    created: int
    with_usage: bool
    named: bool = False
    """Whether the request named the function to call."""
    point: Callable[[Problem], Problem] = lambda problem: problem
    """Lets a problem point into the request as it was sent."""

    def first(self) -> bytes:
        """Return the chunk that names the role."""
        return self._choice({"role": "assistant", "content": "", "refusal": None}, None)

    def text(self, piece: str) -> bytes:
        """Return the chunk of a piece of text."""
        return self._choice({"content": piece}, None)

    def call(self, piece: ToolCallDelta) -> bytes:
        """Return the chunk of a piece of a call; its first has the id and the name."""
        if piece.arguments:
            function = {"arguments": piece.arguments}
            return self._choice(
                {"tool_calls": [{"index": piece.index, "function": function}]}, None
            )
        function = {"name": piece.name, "arguments": ""}
        call = {"index": piece.index, "id": piece.id, "type": "function", "function": function}
        return self._choice({"tool_calls": [call]}, None)

    def last(self, answer: InferAnswer) -> bytes:
        """Return the chunks that end an answer, and tell its tokens if they were asked for."""
        ended = self._choice({}, finish_reason(answer, named=self.named))
        if not self.with_usage:
            return ended + _DONE
        usage = ChatUsage.of(answer.usage).model_dump()
        return ended + self._event({"choices": [], "usage": usage}) + _DONE

    def _choice(self, delta: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._event({
            "choices": [choice],
            **({"usage": None} if self.with_usage else {}),
        })

    def _event(self, fields: dict[str, Any]) -> bytes:
        return _event({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            **fields,
        })


def _event(value: dict[str, Any]) -> bytes:
    # One line of data: JSON escapes the line ends inside of texts.
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


async def stream_chunks(
    services: Services, request: Request, question: Question, chunks: Chunks
) -> EventStream:
    """Return the events of an answer, as soon as its first piece is there.

    Raises:
        Problem: If the answer fails before that; afterwards the failure is an event.
    """
    pieces = stream(services, request, question)
    first = await anext(pieces)
    return EventStream(_events(first, pieces, chunks), source=pieces)


async def _events(
    first: Piece, rest: AsyncGenerator[Piece], chunks: Chunks
) -> AsyncGenerator[bytes]:
    async with aclosing(kept_alive(rest, silence_seconds=HEARTBEAT_SECONDS)) as following:
        yield chunks.first()
        yield _chunk_of(first, chunks)
        try:
            async for piece in following:
                yield _HEARTBEAT if piece is None else _chunk_of(piece, chunks)
        except Exception as error:  # noqa: BLE001 - the answer has begun: whatever it is, it is told
            problem = chunks.point(problem_of(error))
            log.warning("stream_failed", code=problem.code, reason=str(error))
            yield _event({"error": error_of(problem)})


def _chunk_of(piece: Piece, chunks: Chunks) -> bytes:
    if isinstance(piece, str):
        return chunks.text(piece)
    return chunks.call(piece) if isinstance(piece, ToolCallDelta) else chunks.last(piece)


def finish_reason(answer: InferAnswer, *, named: bool) -> str:
    """Return why an answer ended, in OpenAI's words: `stop` after a call that was asked for."""
    return "stop" if named and answer.finish_reason == "tool_calls" else answer.finish_reason
