"""What becomes of a row: the same as encoding it would show, with fewer images decoded."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import PngImagePlugin

from grit_core.data.encoder import ChatEncoder
from grit_core.data.image_tokens import ImageTokens, Sizes
from grit_core.data.row_checker import Finding, RowChecker, RowFate
from grit_core.data.rows import RowEncoder
from grit_core.images import data_url
from grit_core.models.pretrained import load_processor
from grit_core.row_file import RowFile
from tests.image_encodings import raw_png
from tests.tiny_models import (
    png_data_url,
    tiny_causal_folder,
    tiny_chat_rows,
    tiny_vlm_processor,
    write_jsonl,
)

ENCODER = ChatEncoder(tiny_vlm_processor())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The PNG images whose pixels were decoded."""
    found: list[object] = []
    load = PngImagePlugin.PngImageFile.load

    def counted(self: PngImagePlugin.PngImageFile) -> Any:
        if self.fp is not None:
            found.append(self)
        return load(self)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", counted)
    return found


def found_in(
    path: Path,
    *,
    max_length: int = 1000,
    on_long_rows: str = "reject",
    encoder: ChatEncoder = ENCODER,
) -> list[Finding]:
    row_encoder = RowEncoder(encoder, max_length=max_length, on_long_rows=on_long_rows)
    checker, file = RowChecker(row_encoder), RowFile(path)
    found = (checker.finding(file, file.place(index)) for index in range(len(file)))
    return [each for each in found if each is not None]


def long_at(*lines: int, count: int = 12) -> list[dict[str, Any]]:
    rows = tiny_chat_rows(count)
    for line in lines:
        rows[line - 1]["messages"][1]["content"] = "x" * 300
    return rows


def test_sound_rows_give_no_finding_and_only_the_first_image_is_decoded(
    tmp_path: Path, decoded: list[object]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(12))
    assert found_in(path) == []
    assert len(decoded) == 1


def test_long_rows_are_left_out_without_decoding_their_images(
    tmp_path: Path, decoded: list[object]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", long_at(5, 9))
    found = found_in(path, max_length=200, on_long_rows="skip")
    assert found == [Finding(5, RowFate.LEFT_OUT), Finding(9, RowFate.LEFT_OUT)]
    assert len(decoded) == 1


@pytest.mark.parametrize("on_long_rows", ["reject", "skip", "truncate"])
def test_findings_are_those_of_encoding_every_row(tmp_path: Path, on_long_rows: str) -> None:
    rows = tiny_chat_rows(30)
    for index, row in enumerate(rows):
        row["messages"][1]["content"] = "y" * (index * 3 + 1)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    file, row_encoder = RowFile(path), RowEncoder(ENCODER, max_length=10_000)
    lengths = [
        len(row_encoder.whole(file.record(index), place="row")[0].input_ids)
        for index in range(len(file))
    ]
    for max_length in (lengths[10], lengths[10] - 1, lengths[10] + 1):
        found = found_in(path, max_length=max_length, on_long_rows=on_long_rows)
        too_long = [line for line, length in enumerate(lengths, start=1) if length > max_length]
        assert [each.line for each in found] == too_long
        expected = {
            "reject": RowFate.UNUSABLE, "skip": RowFate.LEFT_OUT, "truncate": RowFate.CUT
        }  # fmt: skip
        assert {each.fate for each in found} == {expected[on_long_rows]}


def test_rows_of_several_images_and_of_none_are_measured_too(tmp_path: Path) -> None:
    rows = tiny_chat_rows(8)
    for index, row in enumerate(rows):
        image = row["messages"][0]["content"][0]
        row["messages"][0]["content"][:1] = [image] * (index % 4)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    file, row_encoder = RowFile(path), RowEncoder(ENCODER, max_length=10_000)
    longest = max(
        len(row_encoder.whole(file.record(index), place="row")[0].input_ids)
        for index in range(len(file))
    )
    assert found_in(path, max_length=longest) == []
    found = found_in(path, max_length=longest - 1)
    assert found
    assert f"has {longest} tokens" in found[0].words


def test_images_are_measured_as_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken metadata, and an orientation that a PNG has in words, are no fault of a row."""
    ramp = np.arange(200, dtype=np.uint8).reshape(10, 20)
    upright = (
        b'XML:com.adobe.xmp\0\0\0\0\0<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
        b' tiff:Orientation="6"/>'
    )
    broken = raw_png(ramp, colour=0, before=((b"eXIf", b"hello"),))
    turned = raw_png(ramp, colour=0, before=((b"iTXt", upright),))
    rows = tiny_chat_rows(6)
    for row, data in zip(rows, [broken, turned] * 3, strict=True):
        url = data_url(data)
        row["messages"][0]["content"][0]["image_url"]["url"] = url
    measured = set()
    bounds = ImageTokens.bounds

    def noted(self: ImageTokens, num_plain: int, sizes: Sizes) -> tuple[int, int] | None:
        measured.add(sizes)
        return bounds(self, num_plain, sizes)

    monkeypatch.setattr(ImageTokens, "bounds", noted)
    assert found_in(write_jsonl(tmp_path / "rows.jsonl", rows)) == []
    assert measured == {((20, 10),), ((10, 20),)}


def test_every_kind_of_bad_row_is_found_by_the_files_name_and_the_line(tmp_path: Path) -> None:
    rows = tiny_chat_rows(6)
    rows[1]["messages"][1]["content"] = "<end_of_utterance>"
    rows[2]["messages"] = rows[2]["messages"][:1]
    png = base64.b64decode(png_data_url(0).partition(",")[2])
    cut = "data:image/png;base64," + base64.b64encode(png[:20]).decode()
    rows[3]["messages"][0]["content"][0]["image_url"]["url"] = cut
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    path.write_bytes(path.read_bytes() + b"\n{]\n")
    found = found_in(path)
    assert [each.fate for each in found] == [RowFate.UNUSABLE] * 4
    assert [each.words.partition(":")[0] for each in found] == [
        "rows.jsonl, line 2",
        "rows.jsonl, line 3, /messages",
        "rows.jsonl, line 4",
        "rows.jsonl, line 8, /",
    ]


@pytest.mark.parametrize("error", [ValueError, TypeError, IndexError, KeyError, RuntimeError])
def test_what_a_processor_raises_about_a_row_is_the_rows_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error("a width of 1 is too small")

    monkeypatch.setattr(type(ENCODER.inputs), "__call__", refuse)
    (found,) = found_in(write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(1)))
    assert found.fate is RowFate.UNUSABLE
    assert found.words.startswith(
        f"rows.jsonl, line 1: the model's processor refuses the row ({error.__name__}: "
    )
    assert "a width of 1 is too small" in found.words


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("out of memory"), OSError(5, "disk")]
)
def test_what_is_no_fault_of_a_row_is_not_blamed_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(ENCODER.inputs), "__call__", fail)
    with pytest.raises(type(error)):
        found_in(write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(1)))


def test_a_row_of_which_only_the_first_token_is_the_assistants_is_refused(tmp_path: Path) -> None:
    processor = load_processor(tiny_causal_folder(tmp_path))
    processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    processor.eos_token = None
    row = {"messages": [{"role": "assistant", "content": "x"}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    (found,) = found_in(path, encoder=ChatEncoder(processor))
    assert "only token is the first of the row" in found.words
