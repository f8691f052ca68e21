"""Messages as clients keep them: whatever an answer held can be sent back."""

from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import OpenAI

from grit_core.images import data_url
from tests.api.conftest import png
from tests.api.openai.conftest import HELLO, text_of

AGAIN: Any = {"role": "user", "content": "And this?"}

# What each client makes of the answer "Hello" when it is asked for the message as a dictionary.
DUMPED: dict[str, Any] = {
    "openai": {
        "content": "Hello",
        "refusal": None,
        "role": "assistant",
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    },
    "openai, parsed": {
        "content": "Hello",
        "refusal": None,
        "role": "assistant",
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "parsed": {"answer": "Hello"},
    },
    "langchain, named": {"content": "Hello", "name": "agent", "role": "assistant"},
    "langchain, streamed": {
        "content": [{"type": "text", "text": "Hello", "index": 0, "id": "x", "annotations": []}],
        "role": "assistant",
    },
    "langchain, with thoughts": {
        "content": [
            {"type": "reasoning", "reasoning": "A greeting.", "extras": {"signature": "s"}},
            {"type": "text", "text": "Hello"},
        ],
        "role": "assistant",
    },
    "litellm": {
        "content": "Hello",
        "role": "assistant",
        "tool_calls": None,
        "function_call": None,
        "provider_specific_fields": {"refusal": None},
        "annotations": [],
        "images": [],
        "reasoning_content": "A greeting.",
        "thinking_blocks": [{"type": "thinking", "thinking": "A greeting.", "signature": "s"}],
    },
    "llamaindex": {"role": "assistant", "content": "Hello", "tool_calls": [], "refusal": None},
    "vllm": {"role": "assistant", "content": "Hello", "reasoning": None, "token_ids": None},
    "anthropic's cache": {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}},
        ],
    },
    "a refusal": {"role": "assistant", "content": None, "refusal": "Hello"},
    "a refusal in parts": {
        "role": "assistant",
        "content": [{"type": "refusal", "refusal": "Hello"}],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("client_name", DUMPED)
def test_an_answer_is_sent_back_as_a_client_dumped_it(
    ask: Callable[..., Any], client_name: str
) -> None:
    plain = {"role": "assistant", "content": "Hello"}
    wanted = ask(messages=[*HELLO, plain, AGAIN])
    found = ask(messages=[*HELLO, DUMPED[client_name], AGAIN])
    assert text_of(found) == text_of(wanted)
    assert found.usage.prompt_tokens == wanted.usage.prompt_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "empty",
    [
        {"content": None},
        {"content": ""},
        {"content": []},
        {"content": [{"type": "text", "text": ""}]},
        {"content": None, "refusal": None, "tool_calls": []},
        {},
    ],
)
def test_an_answer_may_have_been_empty(ask: Callable[..., Any], empty: dict[str, Any]) -> None:
    turns = [*HELLO, {"role": "assistant", **empty}, AGAIN]
    wanted = ask(messages=[*HELLO, {"role": "assistant", "content": ""}, AGAIN])
    assert ask(messages=turns).usage.prompt_tokens == wanted.usage.prompt_tokens
    assert wanted.usage.prompt_tokens > ask(messages=[AGAIN]).usage.prompt_tokens


@pytest.mark.slow
def test_messages_of_the_clients_helpers_are_sent_back(
    client: OpenAI, vlm: str, ask: Callable[..., Any]
) -> None:
    # An answer that was cut is an error to the helpers.
    fields: Any = {"model": vlm, "temperature": 0, "stop": text_of(ask())[2]}
    completions = client.chat.completions
    parsed = completions.parse(messages=HELLO, **fields).choices[0].message
    with completions.stream(messages=HELLO, **fields) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.content == parsed.content
    for message in (parsed, streamed):
        for sent in (message, message.model_dump(), message.model_dump(exclude_none=True)):
            turns: Any = [*HELLO, sent, AGAIN]
            assert completions.create(messages=turns, **fields).choices[0].message.content


@pytest.mark.slow
def test_a_user_has_a_name_that_no_template_writes(ask: Callable[..., Any]) -> None:
    assert text_of(ask(messages=[{**HELLO[0], "name": "bob"}])) == text_of(ask())


@pytest.mark.slow
def test_parts_may_be_bare_texts_and_urls(ask: Callable[..., Any]) -> None:
    url = data_url(png())
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    bare = [{"type": "image_url", "image_url": url}, "What?"]
    told = [ask(messages=[{"role": "user", "content": content}]) for content in (parts, bare)]
    assert text_of(told[0]) == text_of(told[1])


@pytest.mark.slow
@pytest.mark.parametrize("roles", [("system", "system"), ("developer", "system", "developer")])
def test_several_system_messages_are_read_as_one(
    ask: Callable[..., Any], roles: tuple[str, ...]
) -> None:
    texts = ["Be brief.", "Be kind.", "Be quick."][: len(roles)]
    several = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    one = {"role": "system", "content": "\n\n".join(texts)}
    found, wanted = ask(messages=[*several, *HELLO]), ask(messages=[one, *HELLO])
    assert text_of(found) == text_of(wanted)
    assert found.usage.prompt_tokens == wanted.usage.prompt_tokens


@pytest.mark.slow
def test_a_long_conversation_is_bounded_by_the_context_and_not_by_its_messages(
    ask: Callable[..., Any],
) -> None:
    turns = [*HELLO, {"role": "assistant", "content": "7"}] * 200
    with pytest.raises(openai.BadRequestError) as refused:
        ask(messages=[*turns, *HELLO])
    assert refused.value.code == "context_length_exceeded", refused.value.message


def test_an_empty_system_message_is_no_fault(ask: Callable[..., Any]) -> None:
    assert ask(messages=[{"role": "system", "content": ""}, *HELLO]).choices


@pytest.mark.slow
def test_a_fault_after_several_system_messages_is_named_where_it_was_sent(
    ask: Callable[..., Any],
) -> None:
    rules = [{"role": "system", "content": text} for text in ("A.", "B.", "C.")]
    broken = {"role": "user", "content": "<end_of_utterance>"}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(messages=[*rules, broken])
    assert refused.value.param == "messages[3].content"


@pytest.mark.slow
def test_a_blank_question_is_refused_by_its_place(ask: Callable[..., Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="The message is empty") as refused:
        ask(messages=[{"role": "user", "content": " "}])
    assert refused.value.param == "messages[0].content"
    assert "line 1" not in refused.value.message
