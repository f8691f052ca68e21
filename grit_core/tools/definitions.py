"""Tools, calls of tools, and which of them an answer may or must hold: plain values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from grit_core.errors import InvalidDataset

_OPENING: Final = frozenset({
    *("$ref", "allOf", "anyOf", "minProperties", "oneOf", "patternProperties", "propertyNames"),
    "required",
})
"""Keywords that say which properties there are, beside `properties`."""


class ToolMode(StrEnum):
    """Whether an answer calls tools."""

    AUTO = "auto"
    """Free text, then any number of calls."""
    REQUIRED = "required"
    """One call or more, and no text before them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of the arguments; empty for a function without parameters."""

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema that the arguments of every call satisfy: an object in any case."""
        if not self.parameters:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        schema = {"type": "object", **self.parameters}
        if schema.get("properties") == {} and not any(schema.get(key) for key in _OPENING):
            # What libraries write for a function without parameters.
            schema.setdefault("additionalProperties", False)
        return schema

    def to_json(self) -> dict[str, Any]:
        """Return the definition as chat templates read it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": {"properties": {}, **self.schema},
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call in an answer, or in an earlier message of a conversation."""

    name: str
    arguments: Mapping[str, Any] | str
    """An object; or the text of a call that was cut off, which is none."""
    id: str = ""

    @property
    def arguments_text(self) -> str:
        """The arguments as the model wrote them."""
        if isinstance(self.arguments, str):
            return self.arguments
        return json.dumps(dict(self.arguments), ensure_ascii=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenCall:
    """A call as the model wrote it."""

    name: str
    arguments: str
    """JSON; cut off where the answer was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """The tools of a request and how its answer uses them."""

    tools: tuple[Tool, ...]
    """Those that the model is shown."""
    mode: ToolMode = ToolMode.AUTO
    name: str | None = None
    """The only tool that may be called, where the request names one."""
    parallel: bool = True
    """Whether an answer may hold several calls."""

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        return tuple(tool for tool in self.tools if self.name in {None, tool.name})

    @property
    def max_calls(self) -> int | None:
        """Most calls of an answer; `None` for no bound."""
        return None if self.parallel and self.name is None else 1


def parse_tool_use(value: Mapping[str, Any] | None) -> ToolUse | None:
    """Read the tools of a worker's payload; `None` where a request has none.

    Args:
        value: `{"tools": [{"name", "description", "parameters"}], "mode", "name", "parallel"}`.

    Raises:
        InvalidDataset: It has another form.
    """
    if value is None:
        return None
    try:
        return ToolUse(
            tools=tuple(Tool(**tool) for tool in value["tools"]),
            mode=ToolMode(value["mode"]),
            name=value["name"],
            parallel=bool(value["parallel"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidDataset(f"the tools of the request cannot be read: {error}") from error
