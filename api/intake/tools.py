"""The tools of an inference request and the calls in its conversation, for the worker."""

import difflib
import json
from typing import Any, Final

from api.errors import InvalidRequest, Item
from api.schemas.infer import InferMessage, InferRequest
from api.schemas.tools import ToolDefinition
from grit_core.errors import Fault, InvalidConfig
from grit_core.grammars import json_rule
from grit_core.json_text import InvalidJson, decode
from grit_core.tools.definitions import Tool

MAX_PARAMETERS_CHARACTERS: Final = 150_000
"""Of all tools of a request together, as JSON."""


def build_tool_use(body: InferRequest) -> dict[str, Any] | None:
    """Return the tools of a request as the worker reads them; `None` where it uses none.

    Raises:
        InvalidRequest: They do not fit together, or answers cannot be held to their parameters.
    """
    tools, choice = body.tools or [], body.tool_choice
    faults = _name_faults(tools)
    if choice is not None and choice.type not in {"none", "auto"} and not tools:
        detail = "`tool_choice` asks for a call, and there are no `tools`; send them."
        faults.append(Item(code="value_invalid", detail=detail, pointer="/tool_choice"))
    name = choice.function.name if choice is not None and choice.function is not None else None
    known = [tool.function.name for tool in tools]
    if tools and name is not None and name not in known:
        faults.append(_unknown(name, known))
    if faults:
        raise InvalidRequest(faults)
    if not tools or (choice is not None and choice.type == "none"):
        return None
    _check_parameters(tools)
    return {
        "tools": [_written(tool) for tool in tools],
        "mode": "auto" if choice is None or choice.type == "auto" else "required",
        "name": name,
        "parallel": body.parallel_tool_calls is not False,
    }


def write_tool_fields(message: InferMessage) -> dict[str, Any]:
    """Return the calls of a message, or the id of the call that it answers."""
    fields: dict[str, Any] = {}
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "name": call.function.name,
                "arguments": _parse_arguments(call.function.arguments),
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _parse_arguments(text: str) -> dict[str, Any] | str:
    """Return arguments as an object; as their text where they are none (a call was cut off)."""
    try:
        value = decode((text or "{}").encode())
    except InvalidJson:
        return text
    return value if isinstance(value, dict) else text


def find_message_faults(messages: list[InferMessage]) -> list[Item]:
    """Return what is wrong with the calls of a conversation and their results."""
    faults: list[Item] = []
    known: set[str] = set()
    for turn, message in enumerate(messages):
        at = f"/messages/{turn}"
        if message.tool_calls and message.role != "assistant":
            detail = f"`tool_calls` belong to the assistant; this message is the {message.role}'s."
            faults.append(Item(code="value_invalid", detail=detail, pointer=f"{at}/tool_calls"))
        if (message.tool_call_id is not None) != (message.role == "tool"):
            detail = "A message of role `tool` has a `tool_call_id`, and no other message."
            faults.append(Item(code="value_invalid", detail=detail, pointer=f"{at}/tool_call_id"))
        elif message.tool_call_id is not None and message.tool_call_id not in known:
            detail = (
                f"No earlier message of the assistant has a call with the id"
                f" {message.tool_call_id!r}; send the message with `tool_calls` before its results."
            )
            faults.append(Item(code="value_invalid", detail=detail, pointer=f"{at}/tool_call_id"))
        if message.role == "tool" and any(part.type != "text" for part in message.content):
            detail = "The result of a tool is text; show images in a message of the user."
            faults.append(Item(code="value_invalid", detail=detail, pointer=f"{at}/content"))
        known |= {call.id for call in message.tool_calls or []}
    return faults


def _name_faults(tools: list[ToolDefinition]) -> list[Item]:
    faults, seen = [], set[str]()
    for index, tool in enumerate(tools):
        name = tool.function.name
        if name in seen:
            pointer = f"/tools/{index}/function/name"
            detail = f"Two tools have the name {name!r}; give each its own."
            faults.append(Item(code="value_invalid", detail=detail, pointer=pointer, input=name))
        seen.add(name)
    return faults


def _unknown(name: str, known: list[str]) -> Item:
    near = difflib.get_close_matches(name, known, n=3) or known[:3]
    detail = f"No tool has the name {name!r}; did you mean {' or '.join(near)}?"
    return Item(
        code="value_unknown", detail=detail, pointer="/tool_choice/function/name", input=name
    )


def _check_parameters(tools: list[ToolDefinition]) -> None:
    """Check that answers can be held to the tools' parameters.

    Raises:
        InvalidConfig: They are too large, or answers cannot; with the faults of all tools.
    """
    num_characters = sum(len(json.dumps(_tool(tool).schema)) for tool in tools)
    if num_characters > MAX_PARAMETERS_CHARACTERS:
        detail = (
            f"The parameters of the tools have {num_characters:,} characters together; at most"
            f" {MAX_PARAMETERS_CHARACTERS:,} are allowed. Leave out descriptions or tools."
        )
        raise InvalidConfig([Fault(pointer="/tools", code="schema_too_large", detail=detail)])
    faults: list[Fault] = []
    for index, tool in enumerate(tools):
        try:
            json_rule(_tool(tool).schema, pointer=f"/tools/{index}/function/parameters")
        except InvalidConfig as error:
            faults += error.faults
    if faults:
        raise InvalidConfig(faults)


def _tool(tool: ToolDefinition) -> Tool:
    return Tool(**_written(tool))


def _written(tool: ToolDefinition) -> dict[str, Any]:
    function = tool.function
    return {
        "name": function.name,
        "description": function.description or "",
        "parameters": function.parameters or {},
    }
