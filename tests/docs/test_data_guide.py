"""docs/data.md: its scripts, run over data as other programs write it, and each row and column."""

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from api.intake import archives, canonical, images, rows
from grit_core.images import MAX_IMAGE_BYTES
from grit_core.records import InvalidRecord, parse_record, reader, row_reader
from store.settings import Settings
from tests.api.conftest import Team
from tests.docs.pages import Block, load, load_blocks
from tests.grit_core.records.chats import DARK, RED, chat

PAGE = "docs/data.md"
GUIDE = load(PAGE)
ROWS = [
    line
    for block in load_blocks(PAGE)
    if block.language == "json"
    for line in block.text.splitlines()
]
REFUSED = [
    name
    for line in GUIDE.splitlines()
    if "`column_not_supported`" in line
    for name in re.findall(r"`(\w+)`", line.split("|")[1])
]
FILES = {"img/a.png": RED, "img/b.png": DARK}


def picture(path: Path, colour: int = 7) -> bytes:
    """Write a small PNG and return its bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (colour, 0, 200)).save(buffer, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def a_folder_and_a_csv(folder: Path) -> None:
    # As spreadsheets write it: a byte order mark is not among what utf-8 skips.
    lines = [("a.png", "What is it?", "A cat"), ("b.png", 'A "big" one?', "Yes, with\na newline")]
    with (folder / "table.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("file", "question", "answer"), *lines])
    for name, _, _ in lines:
        picture(folder / "pictures" / name)


def a_folder_for_each_class(folder: Path) -> None:
    for number, name in enumerate(("cat/1.png", "cat/2.png", "dog/Ä 3.png")):
        picture(folder / "classes" / name, number)


def a_parquet_file(folder: Path) -> None:
    data = picture(folder / "pictures" / "a.png")
    found = [
        {"image": {"bytes": data, "path": "a.png"}, "question": "What is it?", "answer": "A cat"},
        {"image": {"bytes": data, "path": None}, "question": "And this?", "answer": "A dog"},
    ]
    pq.write_table(pa.Table.from_pylist(found), folder / "table.parquet")


def sharegpt(folder: Path) -> None:
    chats = [
        {
            "id": "x",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Name a fruit"},
                {"from": "gpt", "value": "Apple"},
            ],
        },
    ]
    (folder / "chats.json").write_text(json.dumps(chats))


def alpaca(folder: Path) -> None:
    found = [
        {"instruction": "Translate to German.", "input": "Apple", "output": "Apfel"},
        {"instruction": "Name a fruit.", "input": "", "output": "Apple"},
        {"instruction": "Name a fruit.", "output": "Pear"},
    ]
    (folder / "alpaca.json").write_text(json.dumps(found))


def pairs(folder: Path) -> None:
    found = [{"prompt": "Name a fruit", "completion": "Apple"}] * 2
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in found))


def labelme(folder: Path) -> None:
    for name, labels in (("a", ["dog", "cat", "dog"]), ("b", [])):
        picture(folder / "labelme" / f"{name}.png")
        found = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [
                {"label": label, "points": [[1, 2], [3, 4]], "shape_type": "rectangle"}
                for label in labels
            ],
            "imagePath": f"{name}.png",
            "imageData": None,
            "imageHeight": 9,
            "imageWidth": 12,
        }
        (folder / "labelme" / f"{name}.json").write_text(json.dumps(found))


def llava(folder: Path) -> None:
    picture(folder / "pictures" / "a.png")
    chats = [
        {
            "image": "pictures/a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A cat"},
            ],
        },
    ]
    (folder / "chats.json").write_text(json.dumps(chats))


SCRIPTS: dict[str, tuple[Callable[[Path], None], str, int, int]] = {
    "A folder of pictures and a CSV": (a_folder_and_a_csv, "rows.zip", 2, 2),
    "A folder for each class": (a_folder_for_each_class, "rows.zip", 3, 3),
    "Parquet and Hugging Face datasets": (a_parquet_file, "rows.parquet", 2, 2),
    "ShareGPT and LLaVA": (sharegpt, "rows.jsonl", 1, 0),
    "Alpaca": (alpaca, "rows.jsonl", 3, 0),
    "Prompt and completion": (pairs, "rows.jsonl", 2, 0),
    "LabelMe": (labelme, "rows.zip", 2, 2),
}
"""By heading: the data, the file that the script writes, its rows and images."""


def script(heading: str) -> Block:
    start = GUIDE.count("\n", 0, GUIDE.index(f"### {heading}\n"))
    return next(
        each for each in load_blocks(PAGE) if each.language == "python" and each.line > start
    )


def run(block: Block, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", block.text],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{block.place}: {done.stderr}"


@pytest.mark.parametrize("heading", SCRIPTS)
def test_every_script_makes_a_dataset_without_a_bad_row(
    team: Team, tmp_path: Path, heading: str
) -> None:
    write, name, num_rows, num_images = SCRIPTS[heading]
    write(tmp_path)
    run(script(heading), tmp_path)
    answer = team.upload((tmp_path / name).read_bytes(), filename=name)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert (made["num_rows"], made["num_bad_rows"], made["num_images"]) == (num_rows, 0, num_images)
    assert "ignored_columns" not in made["details"], made["details"]


def test_llava_rows_and_their_pictures_are_zipped_as_the_page_says(
    team: Team, tmp_path: Path
) -> None:
    llava(tmp_path)
    run(script("ShareGPT and LLaVA"), tmp_path)
    command = next(text for text in re.findall(r"`(zip [^`]+)`", GUIDE))
    words = command.split()
    assert words[:3] == ["zip", "-r", "rows.zip"]
    archive = [sys.executable, "-m", "zipfile", "-c", "rows.zip", *words[3:]]
    subprocess.run(archive, cwd=tmp_path, check=True)
    answer = team.upload((tmp_path / "rows.zip").read_bytes(), filename="rows.zip")
    assert answer.status_code == 201, answer.text
    assert answer.json()["num_images"] == 1


def test_every_script_of_the_page_is_tried() -> None:
    tried = {script(heading).line for heading in SCRIPTS}
    assert tried == {each.line for each in load_blocks(PAGE) if each.language == "python"}


def test_the_limits_are_those_of_the_code() -> None:
    mebi, gibi = 1024**2, 1024**3
    limits = {
        "one upload": f"{Settings.model_fields['max_upload_bytes'].default // gibi} GiB",
        "rows of a dataset": f"{rows.MAX_ROWS:,}",
        "one row of JSONL": f"{reader.MAX_LINE_BYTES // mebi} MiB",
        "messages of a row": f"{row_reader.MAX_MESSAGES}",
        "images of a row": f"{row_reader.MAX_IMAGES}",
        "text of a part": f"{row_reader.MAX_TEXT_CHARACTERS:,} characters",
        "one image": f"{MAX_IMAGE_BYTES // mebi} MiB, {images.MAX_PIXELS // 10**6} megapixels,"
        f" {images.MAX_SIDE:,} pixels a side, {images.MAX_ASPECT}:1",
        "an archive": f"{archives.MAX_MEMBERS:,} files, {archives.MAX_TOTAL_BYTES // gibi} GiB"
        f" unpacked, {archives.MAX_RATIO} times its size",
        "rows of a report": f"{canonical.MAX_REPORTED:,}",
    }
    section = GUIDE.partition("\n## Limits\n")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"^\| ([a-zA-Z ]+) \| ([^|]+) \|", section, re.MULTILINE))
    assert {name: text.strip() for name, text in shown.items() if name != "what"} == limits


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
