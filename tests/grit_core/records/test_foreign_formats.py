"""Rows of other programs' formats are named, with the way to convert them."""

from typing import Any

import pytest

from tests.grit_core.records.chats import refuse

SHAREGPT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red"}]
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red"}]
CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red"}]


@pytest.mark.parametrize(
    ("row", "name", "pointer"),
    [
        ({"id": "1", "conversations": SHAREGPT}, "ShareGPT", "/conversations"),
        ({"conversations": SHAREGPT, "system": "Be brief."}, "ShareGPT", "/conversations"),
        ({"messages": SHAREGPT}, "ShareGPT", "/messages"),
        ({"image": "a.png", "conversations": LLAVA}, "LLaVA", "/conversations"),
        ({"conversations": LLAVA}, "LLaVA", "/conversations"),
        ({"conversations": CHAT}, "turns are in `conversations`", "/conversations"),
        ({"Messages": CHAT}, "turns are in `Messages`", "/Messages"),
        ({"instruction": "What?", "input": "", "output": "Red"}, "Alpaca", ""),
        ({"INSTRUCTION": "What?", "RESPONSE": "Red"}, "Alpaca", ""),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, "LLaMA-Factory", ""),
        ({"query": "What?", "response": "Red"}, "MS-Swift", ""),
        ({"prompt": "What?", "completion": "Red"}, "prompt and completion", ""),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt and completion", ""),
        ({"prompt": "What?", "chosen": "Red", "rejected": "Blue"}, "DPO", ""),
        ({"chosen": CHAT, "rejected": CHAT}, "DPO", ""),
        ({"prompt": "What?", "completion": "Red", "label": True}, "KTO", ""),
        ({"question": "What?", "answer": "Red"}, "questions and answers", ""),
        ({"image": "a.png", "question": "What?"}, "images and questions", ""),
        ({"image": "a.png", "caption": "A red image."}, "images and captions", ""),
        ({"text": "Once upon a time"}, "plain text", ""),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "tokenized", ""),
        ({"contents": [{"role": "user", "parts": [{"text": "x"}]}]}, "Gemini", "/contents"),
        ({"custom_id": "1", "body": {"messages": CHAT}}, "batch requests", "/body"),
        ({"segments": [{"label": True, "text": "x"}]}, "Axolotl", ""),
    ],
)
@pytest.mark.parametrize("absent", [{}, {"messages": None}, {"messages": []}])
def test_a_row_of_another_format_is_named(
    row: dict[str, Any], name: str, pointer: str, absent: dict[str, Any]
) -> None:
    [fault] = refuse({**absent, **row})
    assert (fault.pointer, fault.code) == (pointer, "format_not_supported")
    assert name in fault.detail
    assert "messages" in fault.detail


@pytest.mark.parametrize("row", [{}, {"id": 3}, {"text": ""}, {"messages": "x", "id": 1}])
def test_a_row_of_no_known_format_needs_messages(row: dict[str, Any]) -> None:
    [fault] = refuse(row)
    assert (fault.pointer, fault.code) == ("/messages", "row_invalid")
