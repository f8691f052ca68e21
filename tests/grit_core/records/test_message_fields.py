"""Messages and parts as other programs write them."""

from typing import Any

import pytest

from grit_core.images import data_url
from grit_core.records import ImagePart, TextPart, no_images, parse_line, parse_prompt
from tests.grit_core.records.chats import DARK, RED, base64_text, chat, read, refuse


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": data_url(RED), "detail": "auto"}},
        {"type": "image_url", "image_url": data_url(RED), "text": None, "index": None},
        {"type": "input_image", "image_url": data_url(RED), "detail": "low"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "image": data_url(RED)},
        {"type": "image", "image": base64_text(RED)},
        {"type": "image", "image": {"bytes": RED, "path": None}},
        {"type": "image", "image": {"url": "a.png"}},
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "base64": base64_text(RED)},
        {"type": "image", "base64": data_url(RED)},
        {"type": "image", "data": base64_text(RED), "mime_type": "image/png"},
        {"type": "image", "bytes": RED, "path": "elsewhere.png"},
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": base64_text(RED)},
        },
        {"image": "a.png"},
        {"image_url": {"url": "a.png"}},
        {"type": None, "image": "a.png", "text": None},
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        {"type": "text", "text": "What?"},
        {"type": "input_text", "text": "What?"},
        {"type": "text", "text": "What?", "image_url": None, "annotations": []},
        {"text": "What?"},
    ],
)
def test_parts_of_every_known_way_are_read(part: dict[str, Any], words: dict[str, Any]) -> None:
    record = read(chat([part, words]))
    assert record.messages[0].content == (ImagePart(0), TextPart("What?"))
    assert record.images == (RED,)


def test_nulls_and_empty_fields_of_messages_and_rows_say_nothing() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Hi", "name": None, "weight": None, "tool_calls": []},
            {
                "role": "assistant",
                "content": "7",
                "reasoning_content": None,
                "tool_calls": None,
                "function_call": {},
                "refusal": "",
                "loss": None,
            },
        ],
        "tools": None,
        "functions": "[]",
        "images": None,
        "image": {"bytes": None, "path": None},
        "videos": [],
        "documents": {},
        "system": " ",
    }
    record = read(row)
    assert [message.text for message in record.messages] == ["Hi", "7"]
    assert (record.images, record.ignored_columns) == ((), ())


def test_the_name_of_a_message_is_ignored_and_reported() -> None:
    row = chat()
    row["messages"][1]["name"] = "agent"
    assert read(row).ignored_columns == ("messages.name",)


def test_a_false_that_may_mean_something_is_reported() -> None:
    row = chat()
    row["messages"][1] |= {"trainable": False, "tool_calls": False, "refusal": False}
    assert read(row).ignored_columns == ("messages.trainable",)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tool_calls", [{"id": "1"}], "Tool calls"),
        ("function_call", {"name": "f"}, "Tool calls"),
        ("tool_call_id", "call_1", "Tool calls"),
        ("reasoning_content", "Hm.", "Reasoning"),
        ("thinking", "Hm.", "Reasoning"),
        ("loss", True, "`weight` 0"),
        ("loss", False, "`weight` 0"),
        ("train", False, "`weight` 0"),
        ("mask", [False], "`weight` 0"),
        ("images", ["a.png"], "part of `content`"),
        ("refusal", "No.", "refusal"),
        ("created", 1700000000, "drop"),
    ],
)
def test_a_field_that_bears_meaning_is_refused_with_the_fix(
    field: str, value: Any, words: str
) -> None:
    row = chat()
    row["messages"][1][field] = value
    [fault] = refuse(row)
    assert (fault.pointer, fault.code) == (f"/messages/1/{field}", "field_unknown")
    assert words in fault.detail


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("human", "Write user."),
        ("gpt", "Write assistant."),
        ("model", "Write assistant."),
        ("User", "Write user."),
        ("developer", "Write system."),
        ("tool", "Results of tools"),
    ],
)
def test_a_role_of_another_format_is_refused_with_ours(role: str, words: str) -> None:
    row = chat()
    row["messages"].insert(0, {"role": role, "content": "x"})
    [fault] = refuse(row)
    assert (fault.pointer, fault.code) == ("/messages/0/role", "row_invalid")
    assert repr(role) in fault.detail
    assert words in fault.detail


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("video", "frames"),
        ("video_url", "frames"),
        ("input_audio", "Audio"),
        ("input_file", "their text"),
        ("tool_use", "Tool calls"),
        ("thinking", "reasoning"),
        ("sticker", "use text, image_url or image"),
    ],
)
def test_a_part_of_another_kind_is_refused_in_words(kind: str, words: str) -> None:
    [fault] = refuse(chat([{"type": kind, kind: "x"}, {"type": "text", "text": "What?"}]))
    assert (fault.pointer, fault.code) == ("/messages/0/content/0/type", "row_invalid")
    assert words in fault.detail


@pytest.mark.parametrize(
    ("part", "pointer", "code"),
    [
        ({"type": "image", "image": "a.png", "url": "a.png"}, "", "type_invalid"),
        ({"type": "image", "image": 3}, "/image", "type_invalid"),
        ({"type": "image", "base64": "!"}, "/base64", "image_corrupt"),
        ({"type": "image", "base64": 3}, "/base64", "type_invalid"),
        ({"type": "image", "image": "a.png", "min_pixels": 9}, "/min_pixels", "field_unknown"),
        ({"type": "input_image", "file_id": "file-1"}, "/file_id", "field_unknown"),
        ({"type": "image_url", "image_url": None}, "/image_url", "type_invalid"),
        (
            {"type": "image", "source": {"type": "url", "url": "https://x/a.png"}},
            "/source/url",
            "image_url_not_allowed",
        ),
    ],
)
def test_a_bad_image_part_is_refused_with_its_place(
    part: dict[str, Any], pointer: str, code: str
) -> None:
    faults = refuse(chat([part, {"type": "text", "text": "What?"}]))
    assert (faults[0].pointer, faults[0].code) == (f"/messages/0/content/0{pointer}", code)


def weighted(*weights: Any) -> dict[str, Any]:
    messages = []
    for index, weight in enumerate(weights):
        messages.append({"role": "user", "content": f"q{index}"})
        messages.append({"role": "assistant", "content": f"a{index}", "weight": weight})
    return {"messages": messages}


def test_weights_are_kept_in_the_stored_row() -> None:
    record = read(weighted(0, 1, None, 1.0))
    assert [message.weight for message in record.messages[1::2]] == [0, 1, 1, 1]
    stored = record.to_line()
    assert stored.count(b'"weight":0') == 1
    assert b'"weight":1' not in stored
    again = parse_line(stored.rstrip(), line=3, resolve_image=no_images)
    assert again == record


@pytest.mark.parametrize("weight", [2, -1, 0.5, "1", True, [1], float("inf")])
def test_another_weight_is_refused(weight: Any) -> None:
    [fault] = refuse(weighted(1, weight))
    assert (fault.pointer, fault.code) == ("/messages/3/weight", "out_of_range")
    assert "0 or 1" in fault.detail


def test_a_weight_of_another_role_is_refused() -> None:
    row = weighted(1)
    row["messages"][0]["weight"] = 1
    [fault] = refuse(row)
    assert (fault.pointer, fault.code) == ("/messages/0/weight", "row_invalid")


def test_a_row_whose_answers_all_have_weight_0_has_nothing_to_learn() -> None:
    [fault] = refuse(weighted(0, 0))
    assert (fault.pointer, fault.code) == ("/messages", "row_invalid")
    assert "weight 0" in fault.detail
    assert parse_prompt(weighted(0)["messages"]).messages[1].weight == 0


def test_images_of_parts_and_of_the_column_keep_their_order() -> None:
    content = [{"type": "image", "path": "img/b.png"}, {"type": "image"}, {"text": "What?"}]
    record = read(chat(content, image="a.png"))
    assert record.images == (DARK, RED)
    assert record.image_pointers == ("/messages/0/content/0", "/image")
