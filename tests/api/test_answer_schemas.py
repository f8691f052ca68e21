"""`schema` of /infer and `response_format` of /v1: refused early, by the place that is wrong."""

import threading
import time
from typing import Any

import pytest

from tests.api.conftest import MODEL, Team


def infer(team: Team, schema: Any, **fields: Any) -> Any:
    return team.post("/infer", json={"model": MODEL, "prompt": "x", "schema": schema, **fields})


def chat(team: Team, response_format: Any) -> Any:
    messages = [{"role": "user", "content": "x"}]
    body = {"model": MODEL, "messages": messages, "response_format": response_format}
    return team.post("/v1/chat/completions", json=body)


def as_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


def test_a_schema_that_can_be_held_gets_as_far_as_the_worker(team: Team) -> None:
    """There is none in these tests."""
    for schema in ({"type": "object"}, {}, {"enum": ["a", "b"]}):
        assert infer(team, schema).json()["code"] == "no_inference_worker"
    for kind in ({"type": "text"}, {"type": "json_object"}, as_format({"type": "array"})):
        assert chat(team, kind).json()["error"]["code"] == "no_inference_worker"
    for more in ({"strict": True}, {"strict": False}, {"description": "d", "strict": None}):
        answer = chat(team, as_format({"type": "object"}, **more))
        assert answer.json()["error"]["code"] == "no_inference_worker"


def test_a_schema_that_cannot_be_held_is_refused_by_its_place_before_any_worker(team: Team) -> None:
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    answer = infer(team, schema)
    assert answer.status_code == 422
    fault = answer.json()["errors"][0]
    assert fault["pointer"] == "/schema/properties/tags/uniqueItems"
    assert fault["code"] == "schema_unsupported"
    answer = chat(team, as_format(schema))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "response_format.json_schema.schema.properties.tags.uniqueItems"
    assert (error["type"], error["code"]) == ("invalid_request_error", "schema_unsupported")
    assert "`uniqueItems`: leave it out" in error["message"]


def test_fields_are_named_as_they_are_sent(team: Team) -> None:
    detail = infer(team, {}, shcema={}).json()["detail"]
    assert detail == "There is no field 'shcema'. Did you mean schema?"
    message = chat(team, as_format({}, shcema={})).json()["error"]["message"]
    assert "Did you mean schema?" in message
    assert "object_schema" not in chat(team, {"type": "text", "grammar": "x"}).text


@pytest.mark.parametrize("schema", [True, "object", [], 3])
def test_a_schema_that_is_no_object_is_refused(team: Team, schema: Any) -> None:
    fault = infer(team, schema).json()["errors"][0]
    assert (fault["pointer"], fault["code"]) == ("/schema", "type_invalid")


@pytest.mark.parametrize(
    ("response_format", "param"),
    [
        ({"type": "grammar"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format"),
        ({"type": "json_object", "json_schema": {"schema": {}}}, "response_format"),
        (
            {"type": "json_schema", "json_schema": {"name": "x"}},
            "response_format.json_schema.schema",
        ),
        (as_format("object"), "response_format.json_schema.schema"),
        (as_format({}, strict="yes"), "response_format.json_schema.strict"),
        (as_format({}, name=""), "response_format.json_schema.name"),
        ("json", "response_format"),
    ],
)
def test_a_wrong_response_format_is_refused_by_its_field(
    team: Team, response_format: Any, param: str
) -> None:
    answer = chat(team, response_format)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_hostile_schemas_are_refused_while_other_requests_are_answered(team: Team) -> None:
    definitions = {
        f"n{index}": {"properties": {"a": {"$ref": f"#/$defs/n{index + 1}"}}}
        for index in range(2500)
    }
    hostile = [
        ({"$ref": "#/$defs/n0", "$defs": definitions | {"n2500": {}}}, "schema_too_large"),
        ({"enum": [f"value-{index}" for index in range(9_000)]}, "schema_too_large"),
        ({"properties": {f"p{index}": {} for index in range(3000)}}, "schema_too_large"),
        ({"pattern": "(" * 5000 + ")" * 5000}, "schema_too_large"),
    ]
    waits: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set() or not waits:
            started = time.monotonic()
            assert team.get("/healthz").status_code == 200
            waits.append(time.monotonic() - started)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for schema, code in hostile:
            answer = infer(team, schema)
            assert answer.status_code == 422
            assert answer.json()["errors"][0]["code"] == code
    finally:
        done.set()
        thread.join()
    assert len(waits) > len(hostile)
