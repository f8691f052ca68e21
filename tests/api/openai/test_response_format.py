"""`response_format` by OpenAI's own client and a real worker, whole and streamed."""

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.api.openai.conftest import Server

pytestmark = pytest.mark.slow

HELLO: Any = [{"role": "user", "content": "Which digit is this?"}]


class Kind(StrEnum):
    ODD = "odd"
    EVEN = "even"


class Part(BaseModel):
    label: Annotated[str, Field(max_length=4)]
    kind: Kind


class Reading(BaseModel):
    digit: Annotated[int, Field(ge=0, le=9)]
    parts: Annotated[list[Part], Field(max_length=1)]
    note: Annotated[str, Field(max_length=4)] | None


@pytest.fixture
def vlm(inference: Callable[[], str]) -> str:
    return inference()


@pytest.fixture
def asked(vlm: str) -> dict[str, Any]:
    return {"model": vlm, "messages": HELLO, "max_tokens": 400, "temperature": 1, "seed": 3}


def test_parse_returns_the_pydantic_model(client: OpenAI, asked: dict[str, Any]) -> None:
    answer = client.chat.completions.parse(**asked, response_format=Reading)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Reading)


def test_a_parsed_stream_ends_with_the_pydantic_model(
    client: OpenAI, asked: dict[str, Any]
) -> None:
    with client.chat.completions.stream(**asked, response_format=Reading) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message
    assert isinstance(final.parsed, Reading)
    assert "".join(deltas) == final.content
    assert len(deltas) > 1
    whole = client.chat.completions.parse(**asked, response_format=Reading)
    assert whole.choices[0].message.content == final.content


def test_a_json_object_is_one_though_nobody_said_json(
    client: OpenAI, asked: dict[str, Any]
) -> None:
    ended = 0
    for seed in range(4):
        answer = client.chat.completions.create(
            **asked | {"seed": seed, "temperature": 0.7}, response_format={"type": "json_object"}
        )
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
            ended += 1
    assert ended


def test_a_json_object_with_a_schema_beside_its_type_is_held_to_it(
    client: OpenAI, asked: dict[str, Any]
) -> None:
    schema = Reading.model_json_schema()
    answer = client.chat.completions.create(
        **asked, extra_body={"response_format": {"type": "json_object", "schema": schema}}
    )
    Reading.model_validate_json(answer.choices[0].message.content or "")
    bad = {"type": "json_object", "schema": {"not": {}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, extra_body={"response_format": bad})
    assert refused.value.param == "response_format.schema.not"


def test_an_answer_that_was_cut_off_raises_in_parse(client: OpenAI, asked: dict[str, Any]) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**asked | {"max_tokens": 5}, response_format=Reading)


def test_infer_takes_the_schema_itself(server: Server, team: str, vlm: str) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    body = {"model": vlm, "prompt": "x", "schema": schema, "max_new_tokens": 100}
    headers = {"Authorization": f"Bearer {server.key(team)}"}
    answer = httpx.post(f"{server.url}/infer", json=body, headers=headers, timeout=60).json()
    assert json.loads(answer["output"])["n"] in {1, 2}
    assert answer["finish_reason"] == "stop"
