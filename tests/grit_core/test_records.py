"""The one reader of dataset rows, and the strict JSON beneath it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_core.images import data_url
from grit_core.json_text import InvalidJson, decode
from grit_core.records import (
    ChatRecord,
    ImagePart,
    InvalidRecord,
    Role,
    TextPart,
    images_beside,
    is_safe_path,
    no_images,
    parse_line,
    parse_record,
    read_records,
)

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"
JPEG = b"\xff\xd8\xff" + b"pixels"


def faults_of(value: Any, **images: bytes) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRecord) as caught:
        parse_record(value, line=3, resolve_image=images.__getitem__)
    assert all(fault.line == 3 and fault.detail for fault in caught.value.row_faults)
    return [(fault.pointer, fault.code) for fault in caught.value.row_faults]


def chat(content: Any, answer: Any = "yes") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
    }


def test_a_row_keeps_the_order_of_words_and_images() -> None:
    content = [
        {"type": "text", "text": "first"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": data_url(JPEG)},
        {"type": "text", "text": "last"},
    ]
    images = {"a.png": PNG}
    record = parse_record(chat(content), line=1, resolve_image=images.__getitem__)
    assert record.messages[0].content == (
        TextPart("first"),
        ImagePart(0),
        ImagePart(1),
        TextPart("last"),
    )
    assert record.images == (PNG, JPEG)
    assert record.messages[1].role is Role.ASSISTANT
    assert record.messages[1].text == "yes"


def test_image_parts_take_from_the_images_column_in_order() -> None:
    row = {
        **chat([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x"}]),
        "images": [{"bytes": PNG, "path": None}, {"bytes": None, "path": "b.jpg"}],
    }
    record = parse_record(row, line=1, resolve_image={"b.jpg": JPEG}.__getitem__)
    assert record.images == (PNG, JPEG)


def test_the_canonical_form_reads_back_as_itself() -> None:
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "é"}]
    record = parse_record(chat(content), line=1, resolve_image={"a.png": PNG}.__getitem__)
    again = parse_line(record.to_line().rstrip(), line=1, resolve_image=no_images)
    assert again == record
    assert again.to_line() == record.to_line()


def test_columns_that_are_not_read_are_named_and_empty_ones_are_not() -> None:
    record = parse_record({**chat("x"), "id": 7, "a": None}, line=1, resolve_image=no_images)
    assert record.ignored_columns == ("id",)


BAD: list[Any] = [
    pytest.param([], [("", "type_invalid")], id="a list"),
    pytest.param({}, [("/messages", "row_invalid")], id="no messages"),
    pytest.param({"messages": []}, [("/messages", "row_invalid")], id="empty messages"),
    pytest.param({"messages": [1]}, [("/messages/0", "type_invalid")], id="a number"),
    pytest.param(
        {"messages": [{"role": "user", "content": "x"}]},
        [("/messages", "row_invalid")],
        id="nothing to learn",
    ),
    pytest.param(
        {"messages": [{"role": "tool", "content": "x"}]},
        [("/messages/0/role", "row_invalid")],
        id="role",
    ),
    pytest.param(chat(""), [("/messages/0/content", "row_invalid")], id="empty text"),
    pytest.param(chat("x", " "), [("/messages/1/content", "row_invalid")], id="empty answer"),
    pytest.param(chat(None), [("/messages/0/content", "type_invalid")], id="null content"),
    pytest.param(chat("a\x00"), [("/messages/0/content/text", "string_invalid")], id="NUL"),
    pytest.param(chat("\ud800"), [("/messages/0/content/text", "string_invalid")], id="surrogate"),
    pytest.param(
        chat([{"type": "video"}]), [("/messages/0/content/0/type", "row_invalid")], id="video"
    ),
    pytest.param(
        chat([{"type": "text", "text": "x", "cache": 1}]),
        [("/messages/0/content/0/cache", "field_unknown")],
        id="unknown field",
    ),
    pytest.param(
        chat([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]),
        [("/messages/0/content/0/image_url/url", "image_url_not_allowed")],
        id="URL",
    ),
    pytest.param(
        chat([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        [("/messages/0/content/0/image_url/url", "image_url_not_allowed")],
        id="file URL",
    ),
    pytest.param(
        chat([{"type": "image_url", "image_url": {"url": "../x.png"}}]),
        [("/messages/0/content/0/image_url/url", "image_path_invalid")],
        id="dots",
    ),
    pytest.param(
        chat([{"type": "image_url", "image_url": {"url": "gone.png"}}]),
        [("/messages/0/content/0/image_url/url", "image_missing")],
        id="gone",
    ),
    pytest.param(
        chat([{"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}]),
        [("/messages/0/content/0/image_url/url", "image_corrupt")],
        id="base64",
    ),
    pytest.param(
        chat([{"type": "image_url", "image_url": {"url": "text.txt"}}]),
        [("/messages/0/content/0", "image_format_not_allowed")],
        id="no image",
    ),
    pytest.param(
        {**chat([{"type": "image"}]), "images": []},
        [("/images", "image_count_mismatch")],
        id="too few images",
    ),
    pytest.param(
        {**chat([{"type": "image"}]), "images": ["a.png", "a.png"]},
        [("/images", "image_count_mismatch")],
        id="too many",
    ),
    pytest.param(
        chat([{"type": "image"}]), [("/messages/0/content/0", "image_count_mismatch")], id="none"
    ),
    pytest.param(
        chat("x", [{"type": "image_url", "image_url": {"url": "a.png"}}]),
        [("/messages/1/content/0", "row_invalid")],
        id="the assistant shows an image",
    ),
]


@pytest.mark.parametrize(("value", "expected"), BAD)
def test_a_bad_row_is_refused_with_its_place(value: Any, expected: list[tuple[str, str]]) -> None:
    images = {"a.png": PNG, "text.txt": b"words"}
    with pytest.raises(InvalidRecord) as caught:
        parse_record(value, line=3, resolve_image=images.__getitem__)
    found = [(fault.pointer, fault.code) for fault in caught.value.row_faults]
    assert found == expected


def test_every_fault_of_a_row_is_told() -> None:
    row = {
        "messages": [
            {"role": "someone", "content": [{"type": "text", "text": 3}]},
            {"role": "assistant", "content": ""},
        ]
    }
    assert faults_of(row) == [
        ("/messages/0/role", "row_invalid"),
        ("/messages/0/content/0/text", "type_invalid"),
        ("/messages/1/content", "row_invalid"),
    ]


def test_a_file_is_read_with_the_images_beside_it_and_none_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    path = folder / "rows.jsonl"
    path.write_text(f"{json.dumps(chat(content))}\n\n{json.dumps(chat('x'))}")
    records = list(read_records(path))
    assert [record.line for record in records] == [1, 3]
    assert records[0].images == (PNG,)
    resolve = images_beside(path)
    for name in ("link.png", "../secret.png", "gone.png"):
        with pytest.raises(LookupError):
            resolve(name)


@pytest.mark.parametrize("name", ["a", "a/b.png", "./a", "a b.png", "ü.png"])
def test_a_plain_relative_path_is_safe(name: str) -> None:
    assert is_safe_path(name)


@pytest.mark.parametrize("name", ["", "/a", "..", "a/../../b", "C:/a", "a\\b", "a\x00", "x" * 256])
def test_another_path_is_not_safe(name: str) -> None:
    assert not is_safe_path(name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SHAPED = st.fixed_dictionaries({
    "messages": st.lists(
        st.fixed_dictionaries({
            "role": st.sampled_from(["user", "assistant", "system"]) | JSON,
            "weight": st.sampled_from([0, 1, None]) | JSON,
            "content": JSON
            | st.lists(
                st.fixed_dictionaries({
                    "type": st.sampled_from(["text", "image_url", "image"]) | JSON,
                    "text": JSON,
                    "image_url": JSON,
                    "image": JSON,
                    "index": st.none() | st.integers(0, 2) | JSON,
                })
            ),
        }),
        max_size=4,
    ),
    "images": st.lists(st.sampled_from([PNG, None, {"bytes": JPEG}]), max_size=3) | JSON,
    "image": st.none() | JSON,
    "tools": JSON,
})


@given(JSON | SHAPED)
def test_any_value_is_a_record_or_is_refused(value: Any) -> None:
    try:
        record = parse_record(value, line=1, resolve_image=no_images)
    except InvalidRecord as error:
        faults = error.row_faults
    else:
        assert isinstance(record, ChatRecord)
        again = parse_line(record.to_line().rstrip(), line=1, resolve_image=no_images)
        assert again == replace(record, ignored_columns=())
        return
    assert faults


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_json_or_are_refused(data: bytes) -> None:
    try:
        value = decode(data)
    except InvalidJson as error:
        told = error.code, error.detail.encode()
    else:
        assert decode(json.dumps(value).encode()) == value
        return
    assert all(told)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b'{"a":1,"a":2}', "json_duplicate_key"),
        (b"[NaN]", "number_not_finite"),
        (b"[1e999]", "number_not_finite"),
        (b"[9223372036854775808]", "out_of_range"),
        (b'["\\ud800"]', "encoding_invalid"),
        (b"\xff\xfe[\x00", "encoding_invalid"),
        (b"[" * 40 + b"]" * 40, "json_too_deep"),
        (b"[" * 100_000, "json_too_deep"),
    ],
    ids=["twice", "nan", "overflow", "64 bit", "surrogate", "utf-16", "deep", "very deep"],
)
def test_what_is_not_strict_json_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(InvalidJson) as caught:
        decode(data)
    assert caught.value.code == code
