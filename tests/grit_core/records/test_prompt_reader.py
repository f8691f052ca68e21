"""Chats to answer, with calls of tools and their results."""

from typing import Any

import pytest

from grit_core.records import InvalidRecord, Role, no_images, parse_prompt, parse_record
from grit_core.tools.definitions import ToolCall

CALL: dict[str, Any] = {"id": "call_1", "name": "look", "arguments": {"at": "it"}}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": [], "tool_calls": [CALL]},
    {"role": "tool", "content": "", "tool_call_id": "call_1"},
]


def test_calls_and_their_results_are_read() -> None:
    _, answer, result = parse_prompt(CHAT).messages
    assert answer.tool_calls == (ToolCall(id="call_1", name="look", arguments={"at": "it"}),)
    assert (answer.text, result.role, result.tool_call_id) == ("", Role.TOOL, "call_1")


def test_a_call_of_another_form_is_refused_with_its_place() -> None:
    chat = [CHAT[0], {**CHAT[1], "tool_calls": [CALL, {"function": "look"}]}]
    with pytest.raises(InvalidRecord) as refused:
        parse_prompt(chat)
    assert [fault.pointer for fault in refused.value.row_faults] == ["/messages/1/tool_calls/1"]


def test_a_row_to_train_on_has_no_calls_and_results() -> None:
    with pytest.raises(InvalidRecord) as refused:
        parse_record({"messages": CHAT}, line=1, resolve_image=no_images)
    assert {fault.pointer for fault in refused.value.row_faults} == {
        "/messages/1/content",
        "/messages/1/tool_calls",
        "/messages/2/content",
        "/messages/2/role",
        "/messages/2/tool_call_id",
    }
