"""Rows are reached by their place in the file, and the index of a large file is small."""

import tracemalloc
from pathlib import Path

import pytest

from grit_core.errors import InvalidDataset
from grit_core.records import MAX_LINE_BYTES
from grit_core.row_file import RowFile, RowPlace
from grit_core.sampler import Sampler, choose_rows, split_rows
from tests.tiny_models import tiny_chat_rows, write_jsonl

MANY = 200_000
LINE = b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n'


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "many.jsonl"
    path.write_bytes(LINE * MANY)
    return path


def test_a_row_is_named_by_its_line_in_the_file_with_blank_lines_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(3, images=False))
    path.write_bytes(b"\n  \r\n" + path.read_bytes().replace(b"\n", b"\r\n"))
    file = RowFile(path)
    assert [file.place(index).line for index in range(len(file))] == [3, 4, 5]
    assert file.words(file.place(1)) == "rows.jsonl, line 4"
    assert file.record(1).line == 4
    assert not path.read_bytes()[file.place(1).offset_bytes :].startswith(b"\r\n")


def test_a_file_is_called_what_the_user_calls_it(tmp_path: Path) -> None:
    path = tmp_path / "3f2a.jsonl"
    path.write_bytes(LINE + b"[]\n")
    file = RowFile(path, name="chats.jsonl")
    with pytest.raises(InvalidDataset, match=r"^chats\.jsonl, line 2, /: "):
        file.record(1)
    assert file.record_at(RowPlace(0, len(LINE) - 1, 1)).line == 1


def test_a_line_longer_than_any_row_may_be_is_an_error_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(LINE)
        file.write(b" " * MAX_LINE_BYTES + LINE)
    rows = RowFile(path)
    assert rows.record(0).line == 1
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl, line 2, /: The line has"):
        rows.record(1)


def test_the_index_of_a_large_file_takes_few_bytes_for_a_row(many: Path) -> None:
    tracemalloc.start()
    try:
        file = RowFile(many)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(file) == MANY
    assert kept / MANY < 24
    assert peak / MANY < 40


def test_the_order_of_a_large_set_takes_few_bytes_for_a_row() -> None:
    tracemalloc.start()
    try:
        train, held_out = split_rows(MANY, eval_fraction=0.1, seed=3)
        sampler = Sampler(rows=train, rows_per_step=8, seed=3)
        first = [sampler.rows_of(step) for step in range(3)]
        chosen = choose_rows(held_out, at_most=100, seed=3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [len(rows) for rows in first] == [8, 8, 8]
    assert len(chosen) == 100
    assert peak / MANY < 48


def test_chosen_rows_are_the_same_for_a_seed_and_ascend() -> None:
    rows = range(100, 200)
    for seed in (0, 2**32 - 1, 2**63 - 1):
        chosen = list(choose_rows(rows, at_most=9, seed=seed))
        assert chosen == sorted(set(chosen))
        assert set(chosen) < set(rows)
        assert chosen == list(choose_rows(rows, at_most=9, seed=seed))
    assert choose_rows(rows, at_most=100, seed=0) == rows
    assert choose_rows(rows, at_most=None, seed=0) == rows
    picks = {tuple(choose_rows(rows, at_most=9, seed=seed)) for seed in range(5)}
    assert len(picks) == 5
