"""Uploads of the bad-input matrix (reliability.md, section 3, B41 to B54) not sent elsewhere."""

import base64
import io
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.testclient import TestClient

from api.intake.canonical import take_in
from api.intake.refusal import Refused
from api.intake.rows import MAX_ROWS
from grit_core.images import data_url
from grit_core.records import MAX_LINE_BYTES
from tests.api.conftest import Team, png, row, rows
from tests.api.test_datasets import jsonl, refused, zipped

FILE_PART = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n--x--\r\n'
)


def send_named(team: Team, name: bytes) -> Any:
    body = FILE_PART % (name, rows(1))
    return team.send("/datasets", body, "multipart/form-data; boundary=x")


@pytest.mark.parametrize("name", [b"a\x00b", b"a\x1bb", b"..", b".", b"a/b", b"a\\\\b", b"x" * 256])
def test_b44_a_file_name_is_a_plain_name(team: Team, name: bytes) -> None:
    refused(send_named(team, name), 422, "filename_invalid")


@pytest.mark.parametrize(
    "name", [b"rows.jsonl", "r\u00f6ws.jsonl".encode(), b"x" * 255, b"CON", b"%00"]
)
def test_b44_a_plain_name_is_taken_and_names_no_file(
    team: Team, client: TestClient, name: bytes
) -> None:
    answer = send_named(team, name)
    assert answer.status_code == 201, answer.text
    home = client.app.state.services.settings.home  # type: ignore[attr-defined] # FastAPI's
    stored = {path.name for path in Path(home).rglob("*") if path.is_file()}
    assert f"{answer.json()['sha256']}.jsonl" in stored
    assert name.decode() not in stored


# --- archives


def patched(data: bytes, signature: bytes, at: int, value: bytes) -> bytes:
    """Overwrite a field of the first record of a kind."""
    place = data.index(signature) + at
    return data[:place] + value + data[place + len(value) :]


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
GOOD = {"rows.jsonl": rows(2), "a.png": png()}


def encrypted() -> bytes:
    made = zipped(GOOD)
    return patched(patched(made, LOCAL, 6, b"\x01\x00"), CENTRAL, 8, b"\x01\x00")


def overlapping() -> bytes:
    """The second member begins inside of the first (a bomb of many members over one)."""
    made = zipped(GOOD)
    second = made.index(CENTRAL, made.index(CENTRAL) + 1)
    return made[: second + 42] + struct.pack("<I", 10) + made[second + 46 :]


def twice() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in (rows(1), rows(2)):
            archive.writestr("rows.jsonl", data)
    return buffer.getvalue()


def nameless() -> bytes:
    made = zipped({"x": b"", **GOOD})
    made = patched(made, LOCAL, 26, b"\x00\x00")
    at = made.index(CENTRAL)
    size = struct.unpack("<I", made[-10:-6])[0]
    cut = made[:at] + made[at : at + 28] + b"\x00\x00" + made[at + 30 : at + 46] + made[at + 47 :]
    return cut[:-10] + struct.pack("<I", size - 1) + cut[-6:]


def lying() -> bytes:
    """The directory promises sixty gigabytes."""
    return patched(zipped(GOOD), CENTRAL, 24, struct.pack("<I", 0xFFFFFFF0))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(encrypted(), "archive_limits", id="encrypted"),
        pytest.param(overlapping(), "archive_limits", id="overlapping"),
        pytest.param(twice(), "archive_limits", id="one name twice"),
        pytest.param(lying(), "archive_limits", id="sizes that lie"),
        pytest.param(nameless(), "archive_unsafe_member", id="no name"),
        *(
            pytest.param(zipped({**GOOD, name: b"x"}), "archive_limits", id=f"nested {name}")
            for name in ("x.tar", "x.tgz", "x.7z", "x.RAR", "x.xz", "x.zst", "b/x.zip")
        ),
        *(
            pytest.param(zipped({**GOOD, name: b"x"}), "archive_limits", id=f"colliding {name}")
            for name in ("A.PNG", "a.Png", "./a.png")
        ),
    ],
)
def test_b46_an_archive_beyond_the_limits_is_refused(team: Team, data: bytes, code: str) -> None:
    refused(team.upload(data), 422, code)


@pytest.mark.slow
def test_b46_an_archive_of_too_many_members_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "upload", "w") as archive:
        for number in range(200_001):
            archive.writestr(zipfile.ZipInfo(f"{number}.png"), b"")
    with pytest.raises(Refused, match="200000 files") as error:
        take_in(tmp_path / "upload", tmp_path / "rows", scratch=tmp_path)
    assert error.value.code == "archive_limits"


@pytest.mark.parametrize(
    "head",
    [
        b"Rar!\x1a\x07\x01\x00",
        b"7z\xbc\xaf\x27\x1c",
        b"ARROW1\x00\x00",
        b"\x28\xb5\x2f\xfd\x00",
        b"\x80\x02]q\x00.",
    ],
    ids=["rar", "7z", "arrow", "zstd", "pickle"],
)
def test_b47_another_format_is_refused(team: Team, head: bytes) -> None:
    refused(team.upload(head + bytes(600)), 415, "format_not_allowed")


@pytest.mark.parametrize(
    "text",
    [
        b"file,answer\na.png,cat\n",
        b"\xef\xbb\xbffile;answer\r\na.png;cat\r\n",
        b"file\tanswer\na.png\tcat\n",
    ],
)
def test_a_table_is_refused_once_and_not_line_by_line(team: Team, text: bytes) -> None:
    document = refused(team.upload(text), 415, "format_not_allowed")
    assert "The file is a table such as CSV" in document["detail"]
    assert document["errors"] == []


def test_b48_a_line_beyond_its_bound_is_a_fault_of_that_line_alone(tmp_path: Path) -> None:
    long = b'{"messages": "' + b"x" * MAX_LINE_BYTES + b'"}\n'
    (tmp_path / "upload").write_bytes(rows(1) + long + rows(1))
    taken = take_in(tmp_path / "upload", tmp_path / "rows", scratch=tmp_path)
    assert [(fault.line, fault.code) for fault in taken.faults] == [(2, "line_too_long")]
    assert taken.num_rows == 2


@pytest.mark.slow
def test_b48_more_lines_than_a_dataset_may_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(rows(1) + b"\n" * MAX_ROWS)
    with pytest.raises(Refused, match="10000000 rows"):
        take_in(tmp_path / "upload", tmp_path / "rows", scratch=tmp_path)


def test_b48_what_a_report_keeps_of_a_stranger_is_short(tmp_path: Path) -> None:
    """A key of a megabyte would else be in the report of every row, and in the database."""
    long = "k" * 1_000_000
    turn = {"role": "user", "content": "x", long: 1}
    good = {**row(), **{f"{long}{number}": 1 for number in range(5)}}
    (tmp_path / "upload").write_bytes(jsonl({"messages": [turn]}, good))
    taken = take_in(tmp_path / "upload", tmp_path / "rows", scratch=tmp_path)
    assert taken.num_bad_rows == 1
    assert len(str(taken.report())) < 5000
    assert len(str(taken.details)) < 5000


# --- images


def saved(kind: str, size: tuple[int, int] = (9, 9), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def frames(kind: str) -> bytes:
    others = [Image.new("RGB", (9, 9), (shade, 0, 0)) for shade in (90, 180)]
    return saved(kind, save_all=True, append_images=others)


def text_bomb() -> bytes:
    """Two kilobytes of compressed text that are two megabytes."""
    notes = PngInfo()
    notes.add_text("x", "a" * 2_000_000, zip=True)
    return saved("PNG", pnginfo=notes)


def without_pixels() -> bytes:
    head = struct.pack(">IIBBBBB", 0, 0, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + head
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


IMAGES = [
    *(
        ("image_format_not_allowed", name, head + bytes(64))
        for name, head in {
            "psd": b"8BPS\x00\x01",
            "eps": b"%!PS-Adobe-3.0 EPSF-3.0",
            "pdf": b"%PDF-1.7",
            "fits": b"SIMPLE  =                    T",
            "gd": b"\xff\xfe\x00\x01",
            "bmp": b"BM",
            "avif": b"\x00\x00\x00 ftypavif",
        }.items()
    ),
    ("image_too_large", "png of 3 frames", frames("PNG")),
    ("image_too_large", "webp of 3 frames", frames("WEBP")),
    ("image_too_large", "8193 wide", saved("PNG", (8193, 50))),
    ("image_too_large", "201 to 1", saved("JPEG", (603, 3))),
    ("image_", "0 x 0", without_pixels()),
    ("image_corrupt", "text bomb", text_bomb()),
    ("image_corrupt", "cut webp", saved("WEBP", (64, 64))[:-30]),
    ("image_corrupt", "scrambled png", saved("PNG", (64, 64)).replace(b"IDAT", b"IDAT\x00", 1)),
]


@pytest.mark.parametrize(
    ("code", "data"),
    [(code, data) for code, _, data in IMAGES],
    ids=[name for _, name, _ in IMAGES],
)
def test_b52_to_b54_a_bad_image_is_refused_whatever_it_calls_itself(
    team: Team, code: str, data: bytes
) -> None:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    problem = refused(team.upload(jsonl(row(image=url))), 422, "dataset_rejected")
    [fault] = problem["errors"]
    assert fault["code"].startswith(code), fault
    assert fault["image"] == 0


def test_b53_an_image_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(jsonl(row(image=data_url(png() + bytes(20 * 1024**2)))))
    taken = take_in(tmp_path / "upload", tmp_path / "rows", scratch=tmp_path)
    assert [fault.code for fault in taken.faults] == ["image_too_large"]
