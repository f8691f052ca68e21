"""The stored form: the lines of the uploaded file, and what its details and notes say."""

import json
from pathlib import Path
from typing import Any

import pytest

from grit_core.errors import InvalidDataset
from grit_core.images import data_url
from grit_core.row_file import RowFile
from tests.api.intake.uploads import RED, jsonl, question, refused, take, taken_rows, zipped

PLACED = (
    "In 1 row the images of the column stand before the first user's words, since no part or"
    " <image> marker places them."
)
MARK = b"\xef\xbb\xbf"


def test_a_row_keeps_the_line_of_the_uploaded_file(tmp_path: Path) -> None:
    good, bad = jsonl(question()), b'{"messages": []}\n'
    taken = take(tmp_path, b"\n" + good + bad + b"  \r\n" + bad + good + good + bad)
    assert (taken.num_rows, taken.num_bad_rows) == (3, 3)
    assert [fault.line for fault in taken.faults] == [3, 5, 8]
    file = RowFile(tmp_path / "rows.jsonl")
    assert [file.record(index).line for index in range(len(file))] == [2, 6, 7]
    assert file.sha256 == taken.sha256
    assert (tmp_path / "rows.jsonl").stat().st_size == taken.size_bytes
    again = take(tmp_path, (tmp_path / "rows.jsonl").read_bytes())
    assert (again.sha256, again.num_rows, again.num_bad_rows) == (taken.sha256, 3, 0)


def test_a_fault_that_is_found_later_names_the_uploaded_line(tmp_path: Path) -> None:
    take(tmp_path, b'{"messages": []}\n\n' + jsonl(question()))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"text"', b'"test"'))
    with pytest.raises(InvalidDataset, match="line 3"):
        RowFile(path).record(0)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("is_cut", [False, True], ids=["ends with a line end", "ends without"])
def test_line_ends_and_marks_of_every_system_are_read(
    tmp_path: Path, end: str, mark: bytes, is_cut: bool
) -> None:
    data = mark + jsonl(question(), question(), end=end)
    data = data.rstrip() if is_cut else data
    taken = take(tmp_path, data)
    assert (taken.num_rows, taken.num_bad_rows) == (2, 0)
    inside = take(tmp_path, zipped({"rows.jsonl": data}))
    assert (inside.num_rows, inside.sha256) == (2, taken.sha256)


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_wide_text_is_refused_in_words(tmp_path: Path, encoding: str) -> None:
    data = jsonl(question()).decode().encode(encoding)
    for upload in (data, zipped({"rows.jsonl": data})):
        error = refused(tmp_path, upload)
        assert error.code == "format_not_allowed"
        assert "UTF-8" in error.detail


@pytest.mark.parametrize("data", [b"", b"\n\n", MARK, MARK + b"\r\n", b" " * 2000 + b"\n"])
def test_a_file_without_a_row_is_refused(tmp_path: Path, data: bytes) -> None:
    assert refused(tmp_path, data).code == "empty_dataset"


def test_a_row_after_many_blanks_is_read(tmp_path: Path) -> None:
    assert take(tmp_path, b"\n" * 100_000 + jsonl(question())).num_rows == 1
    assert RowFile(tmp_path / "rows.jsonl").record(0).line == 100_001


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"instruction": "What?", "input": "", "output": "Red"}, "Alpaca"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "ShareGPT"),
        (question(), ""),
    ],
)
@pytest.mark.parametrize("mark", [b"", MARK])
def test_a_json_list_is_refused_and_its_format_named(
    tmp_path: Path, row: Any, name: str, mark: bytes
) -> None:
    data = mark + json.dumps([row, row], indent=2).encode()
    error = refused(tmp_path, data)
    assert error.code == "dataset_invalid"
    assert "one object a line" in error.detail
    assert name in error.detail
    assert ("which is not read" in error.detail) == bool(name)


def test_rows_of_another_format_are_named_line_by_line(tmp_path: Path) -> None:
    row = {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>x"}]}
    taken = take(tmp_path, zipped({"rows.jsonl": jsonl(row, row), "a.png": RED}))
    assert [(fault.line, fault.code) for fault in taken.faults] == [
        (1, "format_not_supported"),
        (2, "format_not_supported"),
    ]
    assert "LLaVA" in taken.faults[0].detail


def test_ignored_columns_and_placed_images_are_noted(tmp_path: Path) -> None:
    placed = question(image=None, source="web", id=1) | {"image": data_url(RED)}
    members = {"rows.jsonl": jsonl(placed, question(id=2)), "b.png": RED, "c.png": RED}
    taken = take(tmp_path, zipped(members))
    assert taken.details["ignored_columns"] == ["id", "source"]
    assert taken.details["rows_with_placed_images"] == 1
    assert taken.details["notes"] == [
        "The dataset has columns that are not read: id, source.",
        PLACED,
        "No row names 2 files of the archive, such as b.png.",
    ]
    parts = taken_rows(tmp_path)[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text"]


def test_a_file_of_which_everything_is_read_has_no_notes(tmp_path: Path) -> None:
    assert "notes" not in take(tmp_path, jsonl(question())).details


def test_many_ignored_columns_are_counted(tmp_path: Path) -> None:
    columns = {f"c{number:02}": number + 1 for number in range(30)}
    [note] = take(tmp_path, jsonl(question(**columns))).details["notes"]
    assert note.endswith("c18, c19 and 10 more.")


def test_a_broken_image_of_the_column_is_placed_in_the_column(tmp_path: Path) -> None:
    row = question() | {"images": [data_url(RED), data_url(RED[:-30])]}
    [fault] = take(tmp_path, jsonl(row)).faults
    assert (fault.pointer, fault.image, fault.code) == ("/images/1", 1, "image_corrupt")


def test_weights_reach_the_stored_form(tmp_path: Path) -> None:
    row = question()
    row["messages"][1]["weight"] = 1
    row["messages"] += [
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes", "weight": 0},
    ]
    take(tmp_path, jsonl(row))
    [stored] = taken_rows(tmp_path)
    assert [message.get("weight") for message in stored["messages"]] == [None, None, None, 0]


def test_markers_that_no_image_takes_the_place_of_are_noted(tmp_path: Path) -> None:
    shown = question() | {"image": data_url(RED)}
    shown["messages"][0]["content"] = "<image> What?"
    lost = question(image=None)
    lost["messages"][0]["content"] = "<image> What?"
    taken = take(tmp_path, jsonl(shown, lost))
    assert (taken.num_images, taken.details["rows_with_unused_markers"]) == (1, 1)
    [note] = taken.details["notes"]
    assert note.startswith("In 1 row a user's text holds <image> as words")


@pytest.mark.parametrize(("method", "name"), [(9, "Deflate64"), (98, "PPMd"), (77, "method 77")])
def test_a_zip_of_a_method_that_is_not_read_says_so(tmp_path: Path, method: int, name: str) -> None:
    data = zipped({"rows.jsonl": jsonl(question())})
    local, central = data.index(b"PK\x03\x04") + 8, data.index(b"PK\x01\x02") + 10
    for at in (local, central):
        data = data[:at] + method.to_bytes(2, "little") + data[at + 2 :]
    error = refused(tmp_path, data)
    assert error.code == "archive_limits"
    assert f"compressed by {name}, which is not read" in error.detail
