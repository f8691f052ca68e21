"""The OpenAPI document tells the truth, and changes on purpose only."""

import json
from pathlib import Path
from typing import Any

import pytest

from api.errors import KINDS
from api.openapi import snapshot
from grit_core.config.model_configs import MAX_RANK

METHODS = ("get", "post", "put", "patch", "delete")
SNAPSHOT = Path(__file__).parents[2] / "docs" / "openapi.json"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return snapshot()


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method in METHODS
    }


def test_the_document_is_the_one_on_record(document: dict[str, Any]) -> None:
    recorded = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert document == recorded, "run `python -m api.openapi` and look at the difference"


def test_every_route_says_its_scope_or_that_it_is_public(document: dict[str, Any]) -> None:
    public = {name for name, each in operations(document).items() if "security" not in each}
    assert public == {"GET /healthz", "GET /readyz", "GET /metrics", "GET /version"}
    scopes = {
        name: each["x-scope"] for name, each in operations(document).items() if name not in public
    }
    assert scopes["POST /jobs"] == "write"
    assert scopes["POST /infer"] == "infer"
    assert {scope for name, scope in scopes.items() if "/keys" in name} == {"admin"}


def test_every_route_lists_its_problems(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        responses = operation["responses"]
        assert operation["description"], name
        facade = " /v1/" in name
        form = "application/json" if facade else "application/problem+json"
        assert form in responses["500"]["content"], name
        if "security" in operation:
            assert {"401", "403", "503"} <= responses.keys(), name
        if "application/json" in operation.get("requestBody", {}).get("content", {}):
            invalid = set() if facade else {"422"}
            assert {"400", "413", "415"} | invalid <= responses.keys(), name
        for status, response in responses.items():
            for media, content in response.get("content", {}).items():
                if media == "application/problem+json":
                    codes = content["examples"]
                    assert all(KINDS[code].status == int(status) for code in codes), name


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= document["components"]["schemas"].keys()
    assert "#/$defs/" not in text
    assert "HTTPValidationError" not in text


def test_bounds_are_in_the_schema(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    rank = schemas["ModelGRITConfig"]["properties"]["global_rank"]
    assert (rank["minimum"], rank["maximum"], rank["default"]) == (1, MAX_RANK, 16)
    batch = schemas["TrainingConfig"]["properties"]["batch_size"]
    assert batch["anyOf"][1] == {"const": "auto", "type": "string"}


def test_every_number_in_a_request_has_bounds(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    requests = (
        *("JobCreate", "ModelGRITConfig", "ModalityConfig", "TrainingConfig", "InferRequest"),
        "AdapterCompress",
    )
    for schema in requests:
        for name, field in schemas[schema]["properties"].items():
            for each in field.get("anyOf", [field]):
                if each.get("type") in {"integer", "number"}:
                    assert {"maximum", "exclusiveMaximum"} & each.keys(), f"{schema}.{name}"
                    assert {"minimum", "exclusiveMinimum"} & each.keys(), f"{schema}.{name}"
