"""Images of a column: at parts, by index, at markers, or first."""

import time
from typing import Any

import pytest

from grit_core.images import data_url
from grit_core.records import ImagePart, TextPart, no_images, parse_line
from tests.grit_core.records.chats import DARK, RED, base64_text, chat, read, refuse

IMAGE = {"type": "image"}
WORDS = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "column",
    [
        pytest.param({"image": "a.png"}, id="a path"),
        pytest.param({"image": "./a.png"}, id="a path from the folder"),
        pytest.param({"image": data_url(RED)}, id="a data URL"),
        pytest.param({"image": base64_text(RED)}, id="base64"),
        pytest.param({"image": RED}, id="bytes"),
        pytest.param({"image": {"bytes": RED, "path": "gone.png"}}, id="Hugging Face"),
        pytest.param({"image": {"bytes": None, "path": "a.png"}}, id="Hugging Face by path"),
        pytest.param({"image": {"bytes": base64_text(RED)}}, id="Hugging Face as JSON"),
        pytest.param({"image": {"src": "a.png", "height": 2, "width": 3}}, id="with its size"),
        pytest.param({"image": ["a.png"]}, id="a list of one"),
        pytest.param({"images": ["a.png"]}, id="images"),
        pytest.param({"images": "a.png"}, id="images that are one"),
        pytest.param({"images": ["a.png"], "image": None}, id="beside a null"),
        pytest.param({"images": [None, "a.png"], "image": {"bytes": None}}, id="after a null"),
    ],
)
@pytest.mark.parametrize("content", [[IMAGE, WORDS], "<image>What?", "What?", [WORDS]])
def test_an_image_column_is_shown_in_every_form_and_place(
    column: dict[str, Any], content: Any
) -> None:
    record = read(chat(content, **column))
    assert record.images == (RED,)
    assert record.messages[0].content == (ImagePart(0), TextPart("What?"))
    assert record.ignored_columns == ()


def test_an_image_that_nothing_places_comes_before_the_first_users_words() -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What colour?"},
            {"role": "assistant", "content": "Red"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes"},
        ],
        "images": ["a.png", "img/b.png"],
    }
    record = read(row)
    assert record.messages[1].content == (ImagePart(0), ImagePart(1), TextPart("What colour?"))
    assert record.messages[3].content == (TextPart("Sure?"),)
    assert record.images == (RED, DARK)
    assert record.num_placed_images == 2
    assert record.image_pointers == ("/images/0", "/images/1")


def test_markers_of_every_turn_say_where_the_images_go() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "<image>\nWhat? And <image>?"},
            {"role": "assistant", "content": "Red. I see <image>."},
            {"role": "user", "content": [{"type": "text", "text": "Now<image>"}]},
            {"role": "assistant", "content": "Red"},
        ],
        "images": ["a.png", "img/b.png", "a.png"],
    }
    record = read(row)
    assert [message.content for message in record.messages] == [
        (ImagePart(0), TextPart("\nWhat? And "), ImagePart(1), TextPart("?")),
        (TextPart("Red. I see <image>."),),
        (TextPart("Now"), ImagePart(2)),
        (TextPart("Red"),),
    ]
    assert record.images == (RED, DARK, RED)
    assert record.num_placed_images == 0


def test_an_index_picks_its_image_and_may_show_it_twice() -> None:
    content = [
        {"type": "image", "text": None, "index": 1},
        {"type": "text", "text": "What?", "index": None},
        {"type": "image", "text": None, "index": 0},
        {"type": "image", "text": None, "index": 1.0},
    ]
    record = read(chat(content, images=["a.png", {"bytes": DARK, "path": None}]))
    assert record.images == (DARK, RED, DARK)
    again = parse_line(record.to_line().rstrip(), line=3, resolve_image=no_images)
    assert again == record


def test_an_index_counts_the_nulls_of_the_file() -> None:
    content = [{"type": "image", "index": 1}, WORDS]
    assert read(chat(content, images=[None, "img/b.png"])).images == (DARK,)
    [fault] = refuse(chat([{"type": "image", "index": 0}], images=[None, "a.png"]))
    assert (fault.pointer, fault.code) == ("/messages/0/content/0/index", "image_count_mismatch")


@pytest.mark.parametrize(
    ("content", "columns", "pointer", "code", "words"),
    [
        ("x", {"image": "a.png", "images": ["a.png"]}, "/image", "column_not_supported", "images"),
        ("<image>x", {"images": ["a.png"] * 2}, "/images", "image_count_mismatch", "1 <image>"),
        ([IMAGE], {"images": ["a.png"] * 2}, "/images", "image_count_mismatch", "1 `image` parts"),
        ([IMAGE] * 2, {"image": "a.png"}, "/image", "image_count_mismatch", "2 `image` parts"),
        ("x", {"images": ["a.png"] * 33}, "/images", "image_count_mismatch", "at most 32"),
        ("x", {"image": 7}, "/image", "type_invalid", "a number"),
        ("x", {"image": "gone.png"}, "/image", "image_missing", "gone.png"),
        ("x", {"image": "https://x/a.png"}, "/image", "image_url_not_allowed", "never fetched"),
        ("x", {"image": {"src": "https://x/a"}}, "/image/src", "image_url_not_allowed", "never"),
        ("x", {"image": {"pixels": 3}}, "/image/pixels", "field_unknown", "drop"),
        ("x", {"image": {"url": "a.png", "path": "a.png"}}, "/image", "type_invalid", "url, path"),
        ("x", {"images": ["../a.png"]}, "/images/0", "image_path_invalid", "`..`"),
        (
            [{"type": "image", "index": 2}],
            {"images": ["a.png"]},
            "/messages/0/content/0/index",
            "image_count_mismatch",
            "is 2",
        ),
        (
            [{"type": "image", "index": "0"}],
            {"images": ["a.png"]},
            "/messages/0/content/0/index",
            "image_count_mismatch",
            "a text",
        ),
        (
            [{"type": "image", "index": 0}, IMAGE],
            {"images": ["a.png"] * 2},
            "/images",
            "image_count_mismatch",
            "give it to all",
        ),
        (
            [{"type": "image", "index": 0, "image": "a.png"}],
            {},
            "/messages/0/content/0/index",
            "field_unknown",
            "one of the two",
        ),
    ],
)
def test_an_image_column_that_cannot_be_shown_is_refused(
    content: Any, columns: dict[str, Any], pointer: str, code: str, words: str
) -> None:
    [fault] = refuse(chat(content, **columns))
    assert (fault.pointer, fault.code) == (pointer, code)
    assert words in fault.detail


def test_images_without_a_user_to_show_them_are_refused() -> None:
    row = {"messages": [{"role": "assistant", "content": "Ahoy!"}], "image": "a.png"}
    [fault] = refuse(row)
    assert (fault.pointer, fault.code) == ("/image", "image_count_mismatch")


def test_a_marker_without_an_image_column_is_text() -> None:
    record = read(chat("<image> is a tag"))
    assert record.messages[0].text == "<image> is a tag"
    assert read(chat([IMAGE, {"type": "text", "text": "<image>"}], image="a.png")).messages[
        0
    ].content == (ImagePart(0), TextPart("<image>"))


@pytest.mark.parametrize("name", ["img\\b.png", ".\\img\\b.png", "./img/b.png", "cafe\u0301.png"])
def test_an_image_path_is_read_as_other_systems_write_it(name: str) -> None:
    record = read(chat([{"type": "image_url", "image_url": {"url": name}}, WORDS]))
    assert record.images == ((RED,) if "caf" in name else (DARK,))


def test_a_missing_image_of_a_lone_file_says_how_to_send_it() -> None:
    [fault] = refuse(chat(image="a.png"), files=None)
    assert "zip" in fault.detail
    assert "data URL" in fault.detail


@pytest.mark.parametrize("scheme", ["data:", "DATA:", "Data:"])
def test_a_data_url_is_known_in_any_case_and_never_taken_for_a_path(scheme: str) -> None:
    [fault] = refuse(chat(image=f"{scheme}image/png;base64,?"))
    assert fault.code == "image_corrupt"


def test_a_long_text_that_looks_like_base64_is_read_in_linear_time() -> None:
    began = time.process_time()
    [fault] = refuse(chat(image="iVBORw0KGgo" + " " * 900_000 + "!"))
    assert fault.code == "image_path_invalid"
    assert time.process_time() - began < 5  # a quadratic search takes hours
