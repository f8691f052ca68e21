"""Chat completions by a real worker with the tiny VLM, whole and streamed."""

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from api.openai.schemas.chat import UNSUPPORTED, ChatCompletionRequest
from api.openapi import snapshot
from grit_core.images import data_url
from store import adapters
from store.database import transaction
from store.ids import new_id
from store.models import AdapterOrigin
from tests.api.conftest import MODEL, png
from tests.api.openai.conftest import HELLO, VLM, Server, text_of

pytestmark = pytest.mark.slow


def shown(color: int = 7) -> Any:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(png(color=color)), "detail": "auto"}},
        {"type": "text", "text": "Which digit is this?"},
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture
def adapter(server: Server, team: str, client: OpenAI, trained: Path) -> str:
    """An adapter of this test's team."""
    assert client.api_key  # which made the team
    made = new_id("adp")
    server.services.objects.put_folder(f"adapters/{made}", trained)
    with transaction(server.services.engine) as session:
        adapters.create_adapter(
            session,
            id=made,
            team=team,
            origin=AdapterOrigin.IMPORT,
            model=VLM,
            prefix=f"adapters/{made}/",
        )
    return made


# --- whole


def test_an_answer_has_its_text_its_usage_and_its_reason(ask: Callable[..., Any]) -> None:
    answer = ask(messages=shown())
    assert (answer.object, answer.model) == ("chat.completion", VLM)
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.finish_reason in {"stop", "length"}
    assert choice.message.content
    usage = answer.usage
    assert usage.prompt_tokens > usage.prompt_tokens_details.image_tokens == 4
    assert 1 <= usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_prompt_that_was_read_before_is_counted_as_cached(ask: Callable[..., Any]) -> None:
    messages = [{"role": "system", "content": "Answer in one word. " * 8}, *shown(42)]
    cold, warm = (ask(messages=messages) for _ in range(2))
    assert text_of(cold) == text_of(warm)
    assert 0 < warm.usage.prompt_tokens_details.cached_tokens <= warm.usage.prompt_tokens
    assert cold.usage.prompt_tokens_details.cached_tokens == 0


def test_an_image_is_seen(ask: Callable[..., Any]) -> None:
    assert text_of(ask(messages=shown(0))) != text_of(ask(messages=shown(255)))


def test_an_adapter_answers_under_its_id(
    ask: Callable[..., Any], adapter: str, client: OpenAI
) -> None:
    assert adapter in {model.id for model in client.models.list()}
    answer = ask(model=adapter, messages=shown())
    assert answer.model == adapter
    assert text_of(answer) != text_of(ask(messages=shown()))


def test_the_temperature_is_openais_when_it_is_left_out(ask: Callable[..., Any]) -> None:
    sampled = [text_of(ask(temperature=None, seed=seed, max_tokens=16)) for seed in (1, 2, 1)]
    assert sampled[0] == sampled[2]
    assert sampled[0] != sampled[1]
    assert sampled[0] == text_of(ask(temperature=1, seed=1, max_tokens=16))


def test_a_bound_has_two_names(ask: Callable[..., Any]) -> None:
    old, new = ask(max_tokens=2), ask(max_tokens=None, max_completion_tokens=2)
    assert old.usage.completion_tokens == new.usage.completion_tokens == 2
    assert old.choices[0].finish_reason == "length"


@pytest.mark.parametrize("several", [False, True])
def test_a_stop_text_ends_the_answer(ask: Callable[..., Any], several: bool) -> None:
    whole = text_of(ask())
    stop = whole[2]
    answer = ask(stop=[stop, "never"] if several else stop)
    assert text_of(answer) == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_conversation_goes_on_with_the_answers_own_message(ask: Callable[..., Any]) -> None:
    first = ask(messages=[{"role": "system", "content": "Be brief."}, *HELLO])
    more = [*HELLO, first.choices[0].message, {"role": "user", "content": "And this?"}]
    assert ask(messages=more).usage.prompt_tokens > first.usage.prompt_tokens


def test_a_developer_is_the_system(ask: Callable[..., Any]) -> None:
    told = [
        ask(messages=[{"role": role, "content": "Be brief."}, *HELLO])
        for role in ("developer", "system")
    ]
    assert text_of(told[0]) == text_of(told[1])


def test_parameters_that_change_nothing_are_accepted(ask: Callable[..., Any]) -> None:
    harmless = {
        "n": 1,
        "user": "me",
        "metadata": {"a": "b"},
        "safety_identifier": "me",
        "prompt_cache_key": "k",
        "prediction": {"type": "content", "content": "x"},
        "logprobs": False,
        "top_logprobs": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "tools": [],
        "function_call": "auto",
        "functions": [],
        "parallel_tool_calls": True,
        "reasoning_effort": "none",
        "verbosity": "medium",
        "stream_options": {"include_usage": True},
        "stop": "",
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
        "logit_bias": {},
    }
    assert text_of(ask(**harmless)) == text_of(ask())


def test_a_null_says_nothing_whatever_it_is_the_value_of(ask: Callable[..., Any]) -> None:
    names = ChatCompletionRequest.model_fields.keys() - {"model", "messages"}
    nulls = {**dict.fromkeys(names), "max_tokens": 8, "temperature": 0, "of_a_newer_client": None}
    assert text_of(ask(extra_body=nulls)) == text_of(ask())


def test_a_nucleus_of_nothing_is_the_likeliest_token(ask: Callable[..., Any]) -> None:
    answers = {text_of(ask(temperature=2, top_p=0, seed=seed)) for seed in range(3)}
    assert answers == {text_of(ask())}


# --- the bound of an answer


def test_a_prompt_that_fits_is_answered_without_a_bound(ask: Callable[..., Any]) -> None:
    # 1024 tokens are the model's context: no answer of a fixed length would fit beside these.
    long = [{"role": "user", "content": "x" * 960}]
    bound = {"max_tokens": None, "temperature": 0}
    used = ask(messages=long, **bound).usage
    assert used.prompt_tokens > 960
    assert used.total_tokens <= 1024


def test_an_answer_beyond_the_bound_of_the_deployment_is_refused(ask: Callable[..., Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=r"at most 2048 tokens .* 4096 are") as refused:
        ask(max_tokens=4096)
    assert (refused.value.param, refused.value.code) == ("max_tokens", "invalid_value")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 2000}, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 2000}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": None}, "messages"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_words_that_clients_look_for(
    ask: Callable[..., Any], fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(**fields, stream=stream)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", param)
    assert refused.value.type == "invalid_request_error"
    # LiteLLM: `is_error_str_context_window_exceeded`.
    assert "this model's maximum context length is 1024 tokens" in str(refused.value).lower()
    # LangChain: `_handle_openai_bad_request`; versions of OpenAI's client show the code, or do not.
    assert "prompt is too long" in refused.value.message
    assert "Please reduce the length of the messages" in refused.value.message


# --- streamed


def test_a_stream_joins_to_the_whole_answer(ask: Callable[..., Any]) -> None:
    chunks = list(ask(messages=shown(), stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert all(chunk.usage is None for chunk in chunks)
    whole = ask(messages=shown())
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert joined == text_of(whole)


def test_a_stream_comes_in_pieces(ask: Callable[..., Any]) -> None:
    chunks = list(ask(messages=shown(), stream=True, max_tokens=32))
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) > 1


def test_a_stream_tells_its_tokens_when_it_is_asked_to(ask: Callable[..., Any]) -> None:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    whole = ask().usage
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, name) == getattr(whole, name)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_of_the_asynchronous_client(server: Server, vlm: str, team: str) -> None:
    async def read() -> str:
        async with AsyncOpenAI(base_url=server.base_url, api_key=server.key(team)) as client:
            stream = await client.chat.completions.create(
                model=vlm, messages=HELLO, max_tokens=8, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    whole = server.client(team).chat.completions.create(
        model=vlm, messages=HELLO, max_tokens=8, temperature=0
    )
    assert asyncio.run(read()) == text_of(whole)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_cannot_be_answered_is_refused_before_anything_is_sent(
    ask: Callable[..., Any], stream: bool
) -> None:
    said = ["Hello", "<end_of_utterance>", "Hello"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    with pytest.raises(openai.BadRequestError, match="end_of_utterance") as refused:
        ask(messages=messages, stream=stream)
    assert refused.value.param == "messages[1].content"
    assert "line" not in refused.value.message.lower()


# --- refused


ASKED: dict[str, Any] = {
    "audio": {"voice": "x", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"1": 5},
    "logprobs": True,
    "modalities": ["text", "audio"],
    "moderation": {"model": "x"},
    "n": 2,
    "presence_penalty": -1,
    "reasoning_effort": "low",
    "service_tier": "flex",
    "store": True,
    "top_logprobs": 2,
    "verbosity": "low",
    "web_search_options": {},
}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_parameter_that_would_change_the_answer_is_refused_by_name(
    client: OpenAI, name: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"`{name}`: not supported here") as refused:
        client.chat.completions.create(model=MODEL, messages=HELLO, **{name: ASKED[name]})
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", name)
    assert not any(word in refused.value.message for word in ("False", "'"))  # JSON, not Python


def test_every_parameter_of_the_client_is_known_here() -> None:
    known = inspect.signature(OpenAI(api_key="x").chat.completions.create).parameters.keys()
    passed = {"extra_headers", "extra_query", "extra_body", "timeout"}
    assert known - passed == ChatCompletionRequest.model_fields.keys()


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"stop": ["a"] * 9}, "stop", "invalid_value"),
        ({"stop": ["a", 1]}, "stop[1]", "invalid_type"),
        ({"stop": "x" * 101}, "stop", "invalid_value"),
        (
            {"stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "invalid_value",
        ),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "x" * 200_001}]},
            None,
            "body_too_large",
        ),
        ({"messages": [{**HELLO[0], "nom": "me"}]}, "messages[0].nom", "unknown_parameter"),
        (
            {"messages": [*HELLO, {"role": "assistant", "audio": {"id": "a"}}, *HELLO]},
            "messages[1].audio",
            "unsupported_parameter",
        ),
        (
            {"messages": [*HELLO, {"role": "system", "content": "Be brief."}, *HELLO]},
            "messages[1].role",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "messages[0].role",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
                        ],
                    }
                ]
            },
            "messages[0].content[0]",
            "image_url_not_allowed",
        ),
        (
            {"messages": [{"role": "user", "content": shown()[0]["content"] * 9}]},
            "messages",
            "request_too_large",
        ),
        ({"extra_body": {"top_k": 5}}, "top_k", "unknown_parameter"),
    ],
)
def test_what_is_wrong_is_named(
    client: OpenAI, fields: dict[str, Any], param: str | None, code: str
) -> None:
    fields = {"messages": HELLO, "max_completion_tokens": 4, **fields}
    if param == "max_tokens":
        del fields["max_completion_tokens"]
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(model=MODEL, **fields)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_two_names_of_one_bound_may_not_differ(client: OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="newer name, 4; send one") as refused:
        create(model=MODEL, messages=HELLO, max_tokens=3, max_completion_tokens=4)
    assert (refused.value.param, refused.value.code) == ("max_tokens", "invalid_value")


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(client: OpenAI, stream: bool) -> None:
    for name in ("gpt-4o", new_id("adp")):
        with pytest.raises(openai.NotFoundError, match="GET /v1/models") as refused:
            client.chat.completions.create(model=name, messages=HELLO, stream=stream)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_another_teams_adapter_is_not_found(server: Server, adapter: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        server.client("someone-else").chat.completions.create(model=adapter, messages=HELLO)
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_worker_the_answer_says_when_to_come_again(bare: Server, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError) as refused:
        bare.client("alpha").chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert (refused.value.status_code, refused.value.code) == (503, "no_inference_worker")
    assert refused.value.type == "server_error"
    assert int(refused.value.response.headers["Retry-After"]) > 0


def test_the_bounds_are_those_of_infer() -> None:
    schemas = snapshot()["components"]["schemas"]
    ours = schemas["ChatCompletionRequest"]["properties"]
    theirs = schemas["InferRequest"]["properties"]
    names = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
    keys = ("minimum", "maximum", "exclusiveMinimum", "maxItems", "minItems")
    for name in ("temperature", "top_p", "seed", "messages", *names):
        found, wanted = bounds_of(ours[name], keys), bounds_of(theirs[names.get(name, name)], keys)
        assert found == wanted, name
        assert found


def bounds_of(schema: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    kinds = schema.get("anyOf", [schema])
    return {key: kind[key] for kind in kinds for key in keys if key in kind}
