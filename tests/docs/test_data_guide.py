"""Every row and every named column of docs/data.md, read as it says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grit_core.records import InvalidRecord, parse_record
from tests.grit_core.records.chats import DARK, RED, chat

GUIDE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = [
    line
    for block in re.findall(r"^```json\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
REFUSED = [
    name
    for line in GUIDE.splitlines()
    if "`column_not_supported`" in line
    for name in re.findall(r"`(\w+)`", line.split("|")[1])
]
FILES = {"img/a.png": RED, "img/b.png": DARK}


@pytest.mark.parametrize("line", ROWS)
def test_every_example_is_a_row(line: str) -> None:
    row = json.loads(line)
    record = parse_record(row, line=1, resolve_image=FILES.__getitem__)
    assert len(record.images) == line.count(".png")
    assert record.ignored_columns == ()


@pytest.mark.parametrize("name", REFUSED)
def test_every_column_that_the_guide_refuses_is_refused(name: str) -> None:
    value: Any = [7] if name == "labels" else "something else"
    with pytest.raises(InvalidRecord) as caught:
        parse_record(chat(**{name: value}), line=1, resolve_image=FILES.__getitem__)
    assert [fault.code for fault in caught.value.row_faults] == ["column_not_supported"]


def test_the_guide_has_rows_and_columns() -> None:
    assert len(ROWS) >= 10
    assert len(REFUSED) >= 20
