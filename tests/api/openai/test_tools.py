"""Calls of tools by a real worker with the tiny VLM, asked by OpenAI's own client."""

import json
from collections.abc import Callable
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel

from tests.api.conftest import MODEL
from tests.api.openai.conftest import VLM, Server

HELLO: Any = [{"role": "user", "content": "Which digit is this?"}]


class Digit(BaseModel):
    """A digit."""

    value: Literal["one", "two"]
    sure: bool


TOOL: Any = pydantic_function_tool(Digit)
OTHER: Any = {"type": "function", "function": {"name": "pass"}}
NAMED: Any = {"type": "function", "function": {"name": "Digit"}}


@pytest.fixture
def ask(client: OpenAI, inference: Callable[[], str]) -> Callable[..., Any]:
    vlm = inference()

    def completed(**fields: Any) -> Any:
        fields = {"messages": HELLO, "tools": [TOOL], "max_tokens": 200, "seed": 1, **fields}
        return client.chat.completions.create(model=vlm, **fields)

    return completed


def refused(client: OpenAI, **fields: Any) -> openai.BadRequestError:
    fields = {"messages": HELLO, "tools": [TOOL], **fields}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, **fields)
    return error.value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "reason"), [(NAMED, "stop"), ("required", "tool_calls"), ("any", "tool_calls")]
)
def test_a_call_that_is_asked_for_has_arguments_that_the_model_class_takes(
    ask: Callable[..., Any], choice: Any, reason: str
) -> None:
    answer = ask(tool_choice=choice, parallel_tool_calls=False)
    (made,) = answer.choices
    assert (made.finish_reason, made.message.content) == (reason, None)
    (call,) = made.message.tool_calls
    assert (call.type, call.function.name) == ("function", "Digit")
    assert call.id.startswith("call_")
    Digit.model_validate_json(call.function.arguments)


@pytest.mark.slow
def test_a_streamed_call_is_the_whole_one(ask: Callable[..., Any], client: OpenAI) -> None:
    fields: dict[str, Any] = {"tool_choice": NAMED, "seed": 4}
    whole = ask(**fields).choices[0]
    chunks = [each.choices[0] for each in ask(stream=True, **fields)]
    assert [each.finish_reason for each in chunks if each.finish_reason] == ["stop"]
    first, *more = [part for each in chunks for part in each.delta.tool_calls or []]
    assert (first.index, first.type, first.function.name) == (0, "function", "Digit")
    assert first.id.startswith("call_")
    assert more  # how many depends on how fast they come
    assert {(part.index, part.id, part.function.name) for part in more} == {(0, None, None)}
    arguments = "".join(part.function.arguments for part in more)
    assert arguments == whole.message.tool_calls[0].function.arguments
    asked = {"model": VLM, "messages": HELLO, "tools": [TOOL], "max_tokens": 200}
    with client.chat.completions.stream(**asked, **fields) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.arguments == arguments
    assert isinstance(call.function.parsed_arguments, Digit)


@pytest.mark.slow
def test_an_answer_goes_back_with_the_result_of_its_call(ask: Callable[..., Any]) -> None:
    message = ask(tool_choice="required", parallel_tool_calls=False).choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "ok"}]}
    for sent in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        answer = ask(messages=[*HELLO, sent, result], max_tokens=2)
        assert answer.usage.completion_tokens <= 2
    without = ask(messages=[*HELLO, message, result], tools=openai.omit, max_tokens=2)
    assert without.usage.prompt_tokens < answer.usage.prompt_tokens


@pytest.mark.slow
def test_a_call_that_was_cut_off_goes_back_too(ask: Callable[..., Any]) -> None:
    choice = ask(tool_choice=NAMED, max_tokens=45).choices[0]
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "cut off"}
    assert ask(messages=[*HELLO, choice.message, result], max_tokens=1).choices


@pytest.mark.slow
def test_tools_change_nothing_where_none_is_to_be_called(ask: Callable[..., Any]) -> None:
    plain = ask(tools=openai.omit, max_tokens=6)
    for fields in ({"tool_choice": "none"}, {"tools": []}):
        answer = ask(max_tokens=6, **fields)
        assert answer.choices[0].message.content == plain.choices[0].message.content
        assert answer.usage.prompt_tokens == plain.usage.prompt_tokens
        assert answer.choices[0].message.tool_calls is None
    text = ask(max_tokens=6)  # auto
    assert text.choices[0].message.content
    assert text.usage.prompt_tokens > plain.usage.prompt_tokens


@pytest.mark.slow
def test_infer_answers_with_the_same_call(
    ask: Callable[..., Any], client: OpenAI, server: Server
) -> None:
    asked = {"tools": [TOOL], "tool_choice": NAMED, "temperature": 1, "seed": 4}
    body = {"model": VLM, "messages": HELLO, "max_new_tokens": 200, **asked}
    headers = {"Authorization": f"Bearer {client.api_key}"}
    http = client._client
    whole = http.post(f"{server.url}/infer", json=body, headers=headers).json()
    (call,) = whole["tool_calls"]
    assert (whole["output"], whole["finish_reason"]) == ("", "tool_calls")
    same = ask(tool_choice=NAMED, seed=4).choices[0].message.tool_calls[0]
    assert call["function"] == same.function.model_dump()
    with http.stream(
        "POST", f"{server.url}/infer", json={**body, "stream": True}, headers=headers
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    events = [
        (kind.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for kind, data in zip(lines[::2], lines[1::2], strict=True)
    ]
    assert [kind for kind, _ in events[:1]] == ["tool_call"]
    assert events[0][1]["arguments"] == ""
    assert {(data["index"], data["name"]) for kind, data in events if kind == "tool_call"} == {
        (0, "Digit")
    }
    pieces = "".join(data["arguments"] for kind, data in events if kind == "tool_call")
    assert pieces == call["function"]["arguments"]
    assert events[-1][0] == "done"
    assert events[-1][1]["tool_calls"][0]["function"] == call["function"]


# --- refused


def function(**fields: Any) -> Any:
    return {"type": "function", "function": {"name": "f", **fields}}


CALL: Any = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "function"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name", "pattern"),
        ({"tools": [function(name="x" * 65)]}, "tools[0].function.name", "pattern"),
        ({"tools": [function(), function()]}, "tools[1].function.name", "give each its own"),
        ({"tools": [function(name=f"f{n}") for n in range(129)]}, "tools", "128"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function", "an object"),
        (
            {"tools": [OTHER, function(parameters={"type": "object", "not": {"required": ["a"]}})]},
            "tools[1].function.parameters.not",
            "`not`",
        ),
        (
            {
                "tools": [
                    function(
                        parameters={
                            "type": "object",
                            "properties": {"a": {"type": "array", "uniqueItems": True}},
                        }
                    )
                ]
            },
            "tools[0].function.parameters.properties.a.uniqueItems",
            "uniqueItems",
        ),
        (
            {
                "tools": [
                    function(parameters={"description": "x" * 90_000}),
                    *[
                        {
                            "type": "function",
                            "function": {
                                "name": f"g{n}",
                                "parameters": {"description": "x" * 35_000},
                            },
                        }
                        for n in range(2)
                    ],
                ]
            },
            "tools",
            "at most 150,000",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice", "none, auto, required"),
        ({"tools": openai.omit, "tool_choice": "required"}, "tool_choice", "send them"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "Digits"}}},
            "tool_choice.function.name",
            "did you mean Digit",
        ),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "name a function"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "true or false"),
        ({"functions": [{"name": "f"}]}, "functions", "`tools`"),
        ({"function_call": {"name": "f"}}, "function_call", "`tool_choice`"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "call_9"}]},
            "messages[0].tool_call_id",
            "No earlier message",
        ),
        (
            {"messages": [*HELLO, {"role": "tool", "content": "x"}]},
            "messages[1].tool_call_id",
            "has a `tool_call_id`",
        ),
        (
            {"messages": [{**HELLO[0], "tool_calls": [CALL]}]},
            "messages[0].tool_calls",
            "belong to the assistant",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [CALL]},
                    {
                        "role": "tool",
                        "tool_call_id": "call_1",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
                        ],
                    },
                ]
            },
            "messages[1].content",
            "is text",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_named_with_its_place(
    client: OpenAI, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refused(client, **fields)
    assert (error.param or "").startswith(param)
    assert words in error.message


def test_the_faults_of_all_tools_are_named_at_once(client: OpenAI) -> None:
    bad = {"type": "object", "not": {}}
    error = refused(client, tools=[function(name="a", parameters=bad), function(parameters=bad)])
    assert error.message.count("`not`") == 2
