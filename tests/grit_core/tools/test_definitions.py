"""What the arguments of a tool's calls satisfy."""

from typing import Any

import pytest

from grit_core.tools.definitions import Tool

CLOSED = {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize(
    "parameters",
    [{}, {"properties": {}}, {"type": "object", "properties": {}, "required": []}],
    ids=["none", "LangChain", "strict"],
)
def test_a_function_without_parameters_takes_none(parameters: dict[str, Any]) -> None:
    schema = Tool(name="stop", parameters=parameters).schema
    assert {key: schema[key] for key in CLOSED} == CLOSED


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {}, "additionalProperties": {"type": "integer"}},
        {"properties": {}, "additionalProperties": True},
        {"properties": {}, "required": ["a"]},
        {"properties": {}, "$ref": "#/$defs/a", "$defs": {"a": {}}},
    ],
    ids=["typed", "open", "required", "elsewhere"],
)
def test_parameters_that_are_described_elsewhere_stay(parameters: dict[str, Any]) -> None:
    assert Tool(name="store", parameters=parameters).schema == {"type": "object", **parameters}
