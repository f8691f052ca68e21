"""llama-index, by `OpenAILike`, its class for services in OpenAI's shape."""

from harness import QUESTION, TARGET, check, expect, run
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.program.function_program import get_function_tool
from llama_index.llms.openai_like import OpenAILike
from openai import AuthenticationError, BadRequestError, NotFoundError
from pydantic import BaseModel, Field


class Reading(BaseModel):
    """What is on the picture."""

    digit: int = Field(ge=0, le=9)
    inverted: bool


def llm(**options: object) -> OpenAILike:
    """Return a model."""
    settings = {
        "model": TARGET.model,
        "api_key": TARGET.key,
        "temperature": 0,
        "is_chat_model": True,
        "is_function_calling_model": True,
        "context_window": 1024,
        "max_retries": 0,
    }
    return OpenAILike(api_base=TARGET.url, **(settings | options))


ASKED = [
    ChatMessage(
        role="user",
        blocks=[
            ImageBlock(image=TARGET.image.read_bytes(), image_mimetype="image/png"),
            TextBlock(text=QUESTION),
        ],
    )
]


@check("chat")
def _chat() -> None:
    expect(llm().chat(ASKED).message.content, TARGET.answer, "the answer")


@check("stream")
def _stream() -> None:
    text = "".join(piece.delta or "" for piece in llm().stream_chat(ASKED))
    expect(text, TARGET.answer, "the joined pieces")


@check("usage")
def _usage() -> None:
    expect(llm().chat(ASKED).raw.usage.total_tokens > 0, True, "tokens")


@check("echo")
def _echo() -> None:
    whole = llm().chat(ASKED).message
    *_, last = llm().stream_chat(ASKED)
    for message in (whole, last.message):
        llm(max_tokens=8).chat([*ASKED, message, ChatMessage(role="user", content=QUESTION)])


@check("structured output")
def _structured() -> None:
    found = llm(temperature=1).as_structured_llm(Reading).chat(ASKED).raw
    expect(isinstance(found, Reading), True, "by a function call")
    schema = llm(temperature=1, should_use_structured_outputs=True)
    expect(isinstance(schema.as_structured_llm(Reading).chat(ASKED).raw, Reading), True, "schema")


@check("tools")
def _tools() -> None:
    note = get_function_tool(Reading)
    answer = llm().chat_with_tools([note], chat_history=ASKED, tool_required=True)
    calls = llm().get_tool_calls_from_response(answer)
    expect(calls[0].tool_name, "Reading", "the tool")
    Reading.model_validate(calls[0].tool_kwargs)
    result = ChatMessage(
        role="tool", content="noted", additional_kwargs={"tool_call_id": calls[0].tool_id}
    )
    llm(max_tokens=8).chat_with_tools([note], chat_history=[*ASKED, answer.message, result])


@check("errors")
def _errors() -> None:
    for options, messages, kind in (
        ({"api_key": "wrong"}, ASKED, AuthenticationError),
        ({"model": "no-such-model"}, ASKED, NotFoundError),
        ({"additional_kwargs": {"top_p": 7}}, ASKED, BadRequestError),
        ({}, [ChatMessage(role="user", content=TARGET.too_long[0]["content"])], BadRequestError),
    ):
        try:
            llm(**options).chat(messages)
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")


run()
