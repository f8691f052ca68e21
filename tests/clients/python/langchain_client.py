"""langchain-openai: `ChatOpenAI` with a `base_url`."""

from typing import Annotated

from harness import QUESTION, TARGET, check, expect, run
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AuthenticationError, BadRequestError, NotFoundError
from pydantic import BaseModel, Field


class Reading(BaseModel):
    """What is on the picture."""

    digit: int = Field(ge=0, le=9)
    inverted: bool


@tool
def note(digit: Annotated[int, Field(ge=0, le=9)]) -> str:
    """Note the digit."""
    return f"noted {digit}"


def llm(**options: object) -> ChatOpenAI:
    """Return a model with the client's own defaults, but for what is named."""
    settings = {"model": TARGET.model, "api_key": TARGET.key, "temperature": 0, "max_retries": 1}
    return ChatOpenAI(base_url=TARGET.url, **(settings | options))


ASKED = [HumanMessage(content=TARGET.question[0]["content"])]


@check("chat")
def _chat() -> None:
    expect(llm().invoke(ASKED).content, TARGET.answer, "the answer")
    block = {
        "type": "image",
        "base64": TARGET.image_url.partition(",")[2],
        "mime_type": "image/png",
    }
    asked = HumanMessage(content=[block, {"type": "text", "text": QUESTION}])
    expect(llm().invoke([asked]).content, TARGET.answer, "the answer to a standard image block")


@check("stream")
def _stream() -> None:
    text = "".join(chunk.content for chunk in llm().stream(ASKED))
    expect(text, TARGET.answer, "the joined pieces")


@check("usage")
def _usage() -> None:
    whole = llm().invoke(ASKED).usage_metadata
    total = None
    for chunk in llm(stream_usage=True).stream(ASKED):
        total = chunk if total is None else total + chunk
    expect(total.usage_metadata["total_tokens"], whole["total_tokens"], "the streamed total")


@check("echo")
def _echo() -> None:
    answer = llm().invoke(ASKED)
    total = None
    for chunk in llm(stream_usage=True).stream(ASKED):
        total = chunk if total is None else total + chunk
    for message in (answer, total):
        llm(max_tokens=8).invoke([*ASKED, message, HumanMessage(QUESTION)])


@check("structured output")
def _structured() -> None:
    for method in ("json_schema", "function_calling"):
        found = llm(temperature=1).with_structured_output(Reading, method=method).invoke(ASKED)
        expect(isinstance(found, Reading), True, method)
    raw = llm(temperature=1).with_structured_output(Reading, method="json_schema", include_raw=True)
    expect(raw.invoke(ASKED)["parsing_error"], None, "the error of parsing")


@check("tools")
def _tools() -> None:
    bound = llm().bind_tools([note], tool_choice="any", parallel_tool_calls=False)
    answer = bound.invoke(ASKED)
    expect(answer.tool_calls[0]["name"], "note", "the tool")
    expect(isinstance(answer.tool_calls[0]["args"]["digit"], int), True, "the argument")
    result = ToolMessage("noted", tool_call_id=answer.tool_calls[0]["id"])
    llm(max_tokens=8).bind_tools([note]).invoke([*ASKED, answer, result])
    total = None
    for chunk in bound.stream(ASKED):
        total = chunk if total is None else total + chunk
    expect(total.tool_calls[0]["name"], "note", "the streamed tool")


@check("errors")
def _errors() -> None:
    for options, messages, kind in (
        ({"api_key": "wrong"}, ASKED, AuthenticationError),
        ({"model": "no-such-model"}, ASKED, NotFoundError),
        ({"temperature": 7}, ASKED, BadRequestError),
        ({}, [HumanMessage(TARGET.too_long[0]["content"])], ContextOverflowError),
    ):
        try:
            llm(**options).invoke(messages)
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")


run()
