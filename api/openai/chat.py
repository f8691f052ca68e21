"""Chat completions: `POST /infer` in OpenAI's shape, whole or as a stream."""

import time
from collections.abc import Callable
from typing import Any, Final

from anyio import to_thread
from fastapi import Request
from fastapi.responses import Response

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.errors import Problem
from api.inference import Question, answer_of, ask, prepare
from api.openai.chat_stream import Chunks, finish_reason, stream_chunks
from api.openai.models import find_model
from api.openai.schemas.chat import (
    ChatAnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatMessage,
    ChatUsage,
)
from api.openai.schemas.response_format import SCHEMA_POINTER
from api.pointers import pointed, pointing_into
from api.routing import ServiceRouter
from api.schemas.infer import InferRequest
from api.services import Services
from store.database import transaction
from store.keys import Scope
from store.models import Adapter

router = ServiceRouter("openai")

_ROLES: Final = {"developer": "system"}
_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The answer; or, with `stream: true`, server-sent events of"
        " `chat.completion.chunk` objects and a last `[DONE]`. What goes wrong after the first"
        " event comes as an event with an `error`, and ends the stream.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={
        **_ANSWERS,
        **problems(
            "not_found",
            "object_missing",
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
async def create_chat_completion(
    request: Request, body: ChatCompletionRequest, caller: CallerDep, services: ServicesDep
) -> Response | ChatCompletion:
    """Answer a conversation with a base model, or with an adapter over it."""
    names = {
        "/max_new_tokens": f"/{body.bound_name}",
        "/adapter": "/model",
        "/schema": _schema_pointer(body),
    }
    sent = await request.json()
    with pointing_into(sent, names):
        asked = await to_thread.run_sync(_request_of, services, caller.team, body)
        question = await prepare(services, caller.team, asked)
        if body.stream:
            chunks = _chunks(question, body, point=lambda found: pointed(found, sent, names))
            return await stream_chunks(services, request, question, chunks)
        reply = await ask(services, request, question)
        answer = answer_of(question, reply)
    return ChatCompletion(
        id=completion_id(question),
        created=int(time.time()),
        model=body.model,
        choices=[
            ChatChoice(
                message=ChatAnswerMessage.of(answer),
                finish_reason=finish_reason(answer, named=body.names_function),
            )
        ],
        usage=ChatUsage.of(answer.usage),
    )


def _chunks(
    question: Question, body: ChatCompletionRequest, *, point: Callable[[Problem], Problem]
) -> Chunks:
    options = body.stream_options
    return Chunks(
        id=completion_id(question),
        model=body.model,
        created=int(time.time()),
        with_usage=options is not None and bool(options.include_usage),
        named=body.names_function,
        point=point,
    )


def _schema_pointer(body: ChatCompletionRequest) -> str:
    return SCHEMA_POINTER if body.response_format is None else body.response_format.schema_pointer


def completion_id(question: Question) -> str:
    """Return the id of an answer; the question's own is in it, as the worker's log has it."""
    return f"chatcmpl-{question.id}"


def _request_of(services: Services, team: str, body: ChatCompletionRequest) -> InferRequest:
    """Return the request of `POST /infer` that asks the same.

    Raises:
        Problem: If there is no such model for this team.
    """
    with transaction(services.engine, read_only=True) as session:
        found = find_model(session, team, body.model)
    target = {"adapter" if isinstance(found, Adapter) else "model": found.id}
    return InferRequest.model_validate({
        **target,
        "messages": [_message(each) for each in body.messages],
        "max_new_tokens": body.max_completion_tokens or body.max_tokens,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "seed": body.seed,
        "stop": body.stop or [],
        "schema": None if body.response_format is None else body.response_format.answer_schema,
        "stream": bool(body.stream),
        "tools": body.tools,
        "tool_choice": body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
    })


def _message(message: ChatMessage) -> dict[str, Any]:
    read = {"type", "text", "image_url"}
    content = [part.model_dump(exclude_none=True, include=read) for part in message.content]
    return {
        "role": _ROLES.get(message.role, message.role),
        "content": content,
        "tool_calls": message.tool_calls,
        "tool_call_id": message.tool_call_id,
    }
