"""Lines of JSONL as other programs write them."""

import json
import unicodedata
from pathlib import Path

import pytest

from grit_core.records import ImageNotFound, images_beside, is_blank_line, read_records
from grit_core.row_file import RowFile
from tests.grit_core.records.chats import DARK, RED, chat

MARK = b"\xef\xbb\xbf"


def line(answer: str) -> bytes:
    return json.dumps(chat(answer=answer)).encode()


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        pytest.param(MARK + line("a") + b"\n" + line("b") + b"\n", [1, 2], id="a mark"),
        pytest.param(MARK + b"\r\n" + line("a") + b"\r\n" + line("b"), [2, 3], id="only a mark"),
        pytest.param(line("a") + b"\n" + MARK + line("b"), [1, 2], id="two files joined"),
        pytest.param(MARK + b"  " + line("a") + b"\n \t\n\n" + line("b"), [1, 4], id="blanks"),
    ],
)
def test_byte_order_marks_and_blank_lines_are_passed_over(
    tmp_path: Path, data: bytes, lines: list[int]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    file = RowFile(path)
    records = [file.record(index) for index in range(len(file))]
    assert [record.line for record in records] == lines
    assert [record.messages[1].text for record in records] == ["a", "b"]
    assert [record.line for record in read_records(path)] == lines


def test_a_line_with_only_a_mark_is_blank() -> None:
    assert is_blank_line(MARK + b" \r\n")
    assert not is_blank_line(MARK + b"{")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_local_image_is_found_however_its_letters_are_composed(tmp_path: Path, form: str) -> None:
    stored = unicodedata.normalize(form, "café.png")  # type: ignore[arg-type] # one of two
    (tmp_path / stored).write_bytes(RED)
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat(image="café.png")), encoding="utf-8")
    [record] = read_records(tmp_path / "rows.jsonl")
    assert record.images == (RED,)


def test_a_local_image_of_another_case_is_named(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "Scan.PNG").write_bytes(DARK)
    with pytest.raises(ImageNotFound) as caught:
        images_beside(tmp_path / "rows.jsonl")("img/scan.png")
    assert "'Scan.PNG'" in caught.value.hint
    with pytest.raises(ImageNotFound) as caught:
        images_beside(tmp_path / "rows.jsonl")("elsewhere/scan.png")
    assert not caught.value.hint
