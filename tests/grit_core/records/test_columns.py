"""Columns beside the messages: refused where they bear meaning, else ignored and named."""

from math import nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_core.images import data_url
from grit_core.json_text import pointer_of
from grit_core.records import InvalidRecord
from grit_core.records.faults import holds_false, is_empty
from tests.grit_core.records.chats import RED, base64_text, chat, read, refuse

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("tools", TOOLS, "system message"),
        ("tools", '[{"name": "weather"}]', "system message"),
        ("Tools", TOOLS, "system message"),
        ("functions", [{"name": "f"}], "system message"),
        ("function_call", {"name": "f"}, "system message"),
        ("available-tools", ["f"], "system message"),
        ("videos", ["a.mp4"], "frames"),
        ("video", {"bytes": b"x"}, "frames"),
        ("audio", {"array": [0.1], "sampling_rate": 16000}, "Audio"),
        ("image_path", "a.png", "Rename it to `image`"),
        ("image_url", "https://x/a.png", "Rename it to `image`"),
        ("documents", [{"title": "t", "text": "x"}], "user's message"),
        ("chat_template_kwargs", {"enable_thinking": True}, "template"),
        ("chat_template", "{{ x }}", "template"),
        ("chosen", [{"role": "assistant", "content": "a"}], "Preference"),
        ("rejected", "b", "Preference"),
        ("prompt", "Another question", "into `messages`"),
        ("completion", "Blue", "into `messages`"),
        ("system", "Be brief.", "into `messages`"),
        ("history", [["q", "a"]], "into `messages`"),
        ("loss_mask", [0, 1], "`weight` 0"),
        ("labels", [-100, 5], "`weight` 0"),
        ("loss_mask", [False, False], "`weight` 0"),
        ("enable_thinking", False, "template"),
        ("chat_template_kwargs", {"enable_thinking": False}, "template"),
        ("weight", False, "Rows have no weight"),
        ("weight", 0.5, "Rows have no weight"),
        ("input_ids", [1, 2], "tokenized"),
        ("dialog", [{"role": "user", "content": "Another"}], "into `messages`"),
        ("turns", [{"from": "human", "value": "Another"}], "into `messages`"),
    ],
)
def test_a_column_that_bears_meaning_is_refused_with_the_fix(
    column: str, value: Any, words: str
) -> None:
    [fault] = refuse(chat(**{column: value}))
    assert (fault.pointer, fault.code) == (f"/{column}", "column_not_supported")
    assert f"`{column}`" in fault.detail
    assert words in fault.detail


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(RED, id="bytes"),
        pytest.param(data_url(RED), id="a data URL"),
        pytest.param(base64_text(RED), id="base64"),
        pytest.param({"bytes": RED, "path": None}, id="a struct"),
        pytest.param([{"bytes": RED, "path": None}], id="a list"),
        pytest.param("scan-17.JPG", id="a name"),
        pytest.param({"bytes": None, "path": "scan-17.webp"}, id="a struct with a name"),
        pytest.param(["scan-17.png"], id="a list of names"),
        pytest.param(b"GIF89a" + bytes(20), id="another format"),
    ],
)
def test_an_image_in_a_column_of_any_name_is_never_dropped(value: Any) -> None:
    [fault] = refuse(chat(figure=value))
    assert (fault.pointer, fault.code) == ("/figure", "column_not_supported")
    assert "`image`" in fault.detail


def test_the_name_of_an_image_beside_the_image_is_only_reported() -> None:
    assert read(chat(image="a.png", file_name="scan-17.jpg")).ignored_columns == ("file_name",)


@pytest.mark.parametrize("empty", [None, "", " ", [], {}, [None], {"a": None}, "[]", "{}", nan])
@pytest.mark.parametrize(
    "column", ["tools", "videos", "system", "chosen", "chat_template_kwargs", "documents", "id"]
)
def test_a_column_that_holds_nothing_is_neither_refused_nor_reported(
    column: str, empty: Any
) -> None:
    assert read(chat(**{column: empty})).ignored_columns == ()


@pytest.mark.parametrize("column", ["tools", "videos", "system", "chosen", "documents"])
def test_a_false_in_place_of_what_bears_meaning_says_that_there_is_none(column: str) -> None:
    assert read(chat(**{column: False})).ignored_columns == ()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", 7),
        ("source", "web"),
        ("prompt_id", "x"),
        ("category", "colours"),
        ("label", 3),
        ("labels", "red"),
        ("score", 0.5),
        ("verified", False),
        ("weight", 1),
        ("metadata", {"tools": 3}),
        ("text", "anything"),
    ],
)
def test_a_column_that_only_describes_the_row_is_reported(column: str, value: Any) -> None:
    assert read(chat(**{column: value})).ignored_columns == (column,)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("prompt", "What?"),
        ("prompt", [{"role": "user", "content": "What?"}]),
        ("completion", " Red\n"),
        ("prompt", "<user>What?</user><assistant>Red</assistant>"),
        ("conversations", [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red"}]),
    ],
)
def test_a_column_that_repeats_the_messages_is_only_reported(column: str, value: Any) -> None:
    assert read(chat(**{column: value})).ignored_columns == (column,)


def test_every_column_and_message_that_is_wrong_comes_in_one_answer() -> None:
    row = chat("", tools=TOOLS, video="a.mp4")
    assert [(fault.pointer, fault.code) for fault in refuse(row)] == [
        ("/messages/0/content", "row_invalid"),
        ("/tools", "column_not_supported"),
        ("/video", "column_not_supported"),
    ]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
NAMES = st.text(min_size=1, max_size=8) | st.sampled_from([
    *("tools", "videos", "system", "Prompt", "loss-mask", "image_path", "id", "labels", "weight"),
    *("chat_template_kwargs", "conversations", "history", "documents", "source"),
])


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_a_column_that_holds_something_is_read_or_refused_or_reported(
    columns: dict[str, Any],
) -> None:
    row = {**columns, **chat()}
    row.pop("image", None)
    row.pop("images", None)
    try:
        seen = set(read(row).ignored_columns)
    except InvalidRecord as error:
        refused = {fault.pointer for fault in error.row_faults}
        assert refused
        assert refused <= {pointer_of((name,)) for name in row}
        return
    del row["messages"]
    holding = {name for name, value in row.items() if not is_empty(value)}
    assert holding <= seen <= holding | {name for name in row if holds_false(row[name])}
