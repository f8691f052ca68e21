"""Parquet files as Hugging Face's `datasets` and pandas write them."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.api.intake.uploads import GREY, RED, refused, take, taken_rows

TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
PART = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
PARTS_TURN = pa.struct([("content", pa.list_(PART)), ("role", pa.string())])
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red"}]
PICTURE = {"bytes": RED, "path": "1.png"}


def parquet(columns: dict[str, Any], *, chats: list[Any] | None = None) -> bytes:
    """Write a table with the metadata that `datasets` adds; `Image()` is a struct in it."""
    arrays = dict(columns)
    if chats is not None:
        arrays["messages"] = pa.array(chats, pa.list_(TURN))
    table = pa.table(arrays).replace_schema_metadata({"huggingface": '{"info": {"features": {}}}'})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def image_urls(folder: Path) -> list[int]:
    return [
        sum(part["type"] == "image_url" for part in row["messages"][0]["content"])
        for row in taken_rows(folder)
    ]


def test_an_image_column_of_hugging_face_is_shown(tmp_path: Path) -> None:
    data = parquet({"image": pa.array([PICTURE, None], IMAGE)}, chats=[CHAT, CHAT])
    taken = take(tmp_path, data)
    assert (taken.num_rows, taken.num_images, taken.num_bad_rows) == (2, 1, 0)
    assert image_urls(tmp_path) == [1, 0]


def test_a_list_of_images_by_index_is_shown(tmp_path: Path) -> None:
    content = [
        {"index": None, "text": "What?", "type": "text"},
        {"index": 1, "text": None, "type": "image"},
        {"index": 0, "text": None, "type": "image"},
    ]
    answer = [{"index": None, "text": "Red", "type": "text"}]
    chat = [{"content": content, "role": "user"}, {"content": answer, "role": "assistant"}]
    data = parquet({
        "messages": pa.array([chat], pa.list_(PARTS_TURN)),
        "images": pa.array([[PICTURE, {"bytes": GREY, "path": None}]], pa.list_(IMAGE)),
    })
    taken = take(tmp_path, data)
    assert (taken.num_rows, taken.num_images) == (1, 2)
    assert image_urls(tmp_path) == [2]


def test_columns_that_bear_meaning_are_refused_and_others_reported(tmp_path: Path) -> None:
    data = parquet(
        {
            "id": pa.array([1, 2, 3]),
            "source": pa.array(["x", "y", "z"]),
            "score": pa.array([0.5, 1.0, None]),
            "embedding": pa.array([[0.5] * 4] * 3, pa.list_(pa.float32(), 4)),
            "tools": pa.array(["[]", '[{"name": "f"}]', None]),
            "system": pa.array(["", None, "Be brief."]),
            "input_ids": pa.array([None, None, [1, 2]], pa.list_(pa.int32())),
            "__index_level_0__": pa.array([0, 1, 2]),
        },
        chats=[CHAT] * 3,
    )
    taken = take(tmp_path, data)
    assert [(fault.line, fault.pointer, fault.code) for fault in taken.faults] == [
        (2, "/tools", "column_not_supported"),
        (3, "/system", "column_not_supported"),
        (3, "/input_ids", "column_not_supported"),
    ]
    assert taken.num_rows == 1
    assert taken.details["ignored_columns"] == ["embedding", "id", "score", "source"]


def test_images_in_a_column_of_another_name_are_never_dropped(tmp_path: Path) -> None:
    data = parquet({"screenshot": pa.array([PICTURE], IMAGE)}, chats=[CHAT])
    [fault] = take(tmp_path, data).faults
    assert (fault.pointer, fault.code) == ("/screenshot", "column_not_supported")


def test_an_image_of_which_only_the_path_is_there_says_what_to_do(tmp_path: Path) -> None:
    data = parquet({"image": pa.array([{"bytes": None, "path": "1.png"}], IMAGE)}, chats=[CHAT])
    [fault] = take(tmp_path, data).faults
    assert (fault.pointer, fault.code) == ("/image/path", "image_missing")
    assert "zip" in fault.detail


def test_rows_keep_their_numbers(tmp_path: Path) -> None:
    bad = [{"role": "user", "content": "x"}]
    taken = take(tmp_path, parquet({}, chats=[bad, CHAT, bad, CHAT]))
    assert [fault.line for fault in taken.faults] == [1, 3]
    lines = (tmp_path / "rows.jsonl").read_bytes().split(b"\n")
    assert [number for number, line in enumerate(lines, start=1) if line] == [2, 4]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"instruction": ["x"], "input": [""], "output": ["y"]}, "Alpaca"),
        ({"text": ["once upon a time"]}, "plain text"),
        ({"prompt": ["x"], "chosen": ["y"], "rejected": ["z"]}, "DPO"),
        ({"image": pa.array([PICTURE], IMAGE), "question": ["x"], "answer": ["y"]}, "questions"),
        ({"pixels": [[1, 2]]}, ""),
        ({"text": pa.array([], pa.string())}, ""),
    ],
)
def test_a_file_without_messages_is_refused_and_its_format_named(
    tmp_path: Path, columns: dict[str, Any], name: str
) -> None:
    error = refused(tmp_path, parquet(columns))
    assert error.code == "dataset_invalid"
    assert "no column `messages`" in error.detail
    assert name in error.detail
    assert ("which is not read" in error.detail) == bool(name)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    """Of the two a row would hold the last, here one without an image."""
    chats = pa.array([CHAT], pa.list_(TURN))
    images = [pa.array([PICTURE], IMAGE), pa.array([None], IMAGE)]
    table = pa.Table.from_arrays([chats, *images], names=["messages", "image", "image"])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    error = refused(tmp_path, buffer.getvalue())
    assert (error.code, "same name: image" in error.detail) == ("dataset_invalid", True)


def test_a_missing_number_is_nothing(tmp_path: Path) -> None:
    """Pandas writes NaN for an `index` that a part has not."""
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("index", pa.float64())])
    turn = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    nan = float("nan")
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "text": None, "index": nan},
                {"type": "text", "text": "What?", "index": nan},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Red", "index": nan}]},
    ]
    images = pa.array([[PICTURE]], pa.list_(IMAGE))
    data = parquet({"messages": pa.array([chat], pa.list_(turn)), "images": images})
    assert take(tmp_path, data).faults == []
    assert image_urls(tmp_path) == [1]
