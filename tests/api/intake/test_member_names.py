"""Archives as other systems and programs write them."""

import io
import shutil
import stat
import struct
import subprocess
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pytest

from api.intake.member_names import MemberIndex, is_added_by_system, zip_member_name
from grit_core.images import data_url
from tests.api.intake.uploads import (
    GREY,
    RED,
    jsonl,
    question,
    refused,
    take,
    taken_rows,
    zipped,
)

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
COMPOSED, DECOMPOSED = "caf\u00e9.png", "cafe\u0301.png"


def raw_zip(members: dict[bytes, bytes], *, is_utf8: bool = False, extra: bytes = b"") -> bytes:
    """Write a zip whose names are exactly these bytes, as programs of other systems do."""
    body, directory = b"", b""
    for name, data in members.items():
        flag, checksum = 0x800 if is_utf8 else 0, zlib.crc32(data)
        sizes = struct.pack("<III", checksum, len(data), len(data))
        lengths = struct.pack("<HH", len(name), len(extra))
        head = struct.pack("<HHHHH", 20, flag, 0, 0, 33) + sizes + lengths
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + head
        directory += struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name + extra
        body += b"PK\x03\x04" + head + name + extra + data
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + end


@pytest.mark.parametrize(
    "name",
    [
        "._a.png",
        "set/._a.png",
        "__MACOSX/a.png",
        "__MACOSX/set/._a.png",
        "set/__MACOSX/a.jsonl",
        ".DS_Store",
        "set/.DS_Store",
        "Thumbs.db",
        "set\\Thumbs.db",
        "set/THUMBS.DB",
        "set/desktop.ini",
        "set/Icon\r",
        "set/@eaDir/a.png",
        "set/.ipynb_checkpoints/rows-checkpoint.jsonl",
    ],
)
def test_a_file_that_a_system_added_is_ignored(tmp_path: Path, name: str) -> None:
    assert is_added_by_system(name)
    members = {"set/rows.jsonl": jsonl(question("a.png")), "set/a.png": RED, name: APPLE_DOUBLE}
    taken = take(tmp_path, zipped(members))
    assert (taken.num_rows, taken.num_images) == (1, 1)
    assert "unused_files" not in taken.details


@pytest.mark.parametrize("name", ["a._b.png", "MACOSX/a.png", "Thumbs.db.png", "desktop.ini/a.png"])
def test_a_file_of_the_users_own_is_none_of_those(name: str) -> None:
    assert not is_added_by_system(name)


@pytest.mark.parametrize("path", ["img/a.png", "img\\a.png", "./img/a.png", "set/img/a.png"])
def test_names_with_backslashes_are_found(tmp_path: Path, path: str) -> None:
    members = {
        b"set\\": b"",
        b"set\\rows.jsonl": jsonl(question(path)),
        b"set\\img\\a.png": RED,
    }
    taken = take(tmp_path, raw_zip(members))
    assert (taken.num_rows, taken.num_images) == (1, 1)
    assert taken.details["rows_file"] == "set/rows.jsonl"


@pytest.mark.parametrize(
    "name", [b"..\\a.png", b"C:\\a.png", b"\\\\server\\a.png", b"a\\..\\..\\b"]
)
def test_backslashes_lead_nowhere_else(tmp_path: Path, name: bytes) -> None:
    members = {b"rows.jsonl": jsonl(question()), name: RED}
    assert refused(tmp_path, raw_zip(members)).code == "archive_unsafe_member"


@pytest.mark.parametrize("path", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("is_utf8", [True, False], ids=["flagged", "without the flag"])
def test_accents_are_one_name_however_they_are_written(
    tmp_path: Path, name: str, path: str, is_utf8: bool
) -> None:
    members = {b"rows.jsonl": jsonl(question(path)), name.encode(): RED}
    taken = take(tmp_path, raw_zip(members, is_utf8=is_utf8))
    assert (taken.num_rows, taken.num_images) == (1, 1)


def test_a_name_in_code_page_437_is_read_as_that(tmp_path: Path) -> None:
    members = {b"rows.jsonl": jsonl(question(COMPOSED)), COMPOSED.encode("cp437"): RED}
    assert take(tmp_path, raw_zip(members)).num_images == 1


def test_a_name_in_an_extra_field_comes_before_the_raw_one(tmp_path: Path) -> None:
    raw = "caf?.\u00e9".encode("cp437")
    checksum = struct.pack("<BI", 1, zlib.crc32(raw))
    data = checksum + COMPOSED.encode()
    extra = struct.pack("<HH", 0x7075, len(data)) + data
    members = {b"rows.jsonl": jsonl(question(COMPOSED)), raw: RED}
    assert take(tmp_path, raw_zip(members, extra=extra)).num_images == 1
    info = zipfile.ZipInfo(raw.decode("cp437"))
    info.extra = extra[:-3]  # cut: then the raw name stands
    assert zip_member_name(info) == "caf?.\u00e9"
    info.extra = struct.pack("<HH", 0x7075, 9) + struct.pack("<BI", 1, 0) + b"a.png"
    assert zip_member_name(info) == "caf?.\u00e9"


@pytest.mark.parametrize(
    "names",
    [
        (COMPOSED, DECOMPOSED),
        ("img/a.png", "img\\a.png"),
        ("a.png", "./a.png"),
        ("A.png", "a.PNG"),
        (COMPOSED, DECOMPOSED.upper()),
    ],
)
def test_two_names_of_one_file_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    members = {b"rows.jsonl": jsonl(question())}
    members |= {name.encode(): RED for name in names}
    error = refused(tmp_path, raw_zip(members, is_utf8=True))
    assert error.code == "archive_limits"
    assert "twice" in error.detail


@pytest.mark.parametrize(
    ("rows_file", "image", "path"),
    [
        ("rows.jsonl", "a.png", "a.png"),
        ("set/rows.jsonl", "set/a.png", "a.png"),
        ("set/rows.jsonl", "set/a.png", "set/a.png"),
        ("set/rows.jsonl", "a.png", "a.png"),
        ("set/annotations/rows.jsonl", "set/images/a.png", "images/a.png"),
        ("set/annotations/rows.jsonl", "set/images/a.png", "set/images/a.png"),
        ("annotations/rows.jsonl", "images/a.png", "images/a.png"),
    ],
)
def test_a_path_starts_at_the_rows_folder_or_at_one_around_it(
    tmp_path: Path, rows_file: str, image: str, path: str
) -> None:
    members = {rows_file: jsonl(question(path)), image: RED}
    assert take(tmp_path, zipped(members)).num_images == 1


def test_the_nearest_folder_comes_first(tmp_path: Path) -> None:
    members = {"set/rows.jsonl": jsonl(question("a.png")), "a.png": GREY, "set/a.png": RED}
    take(tmp_path, zipped(members))
    [row] = taken_rows(tmp_path)
    url = row["messages"][0]["content"][0]["image_url"]["url"]
    assert url == data_url(RED)
    index = MemberIndex({"set/rows.jsonl", "a.png", "set/a.png"}, rows_name="set/rows.jsonl")
    assert index.find("a.png") == "set/a.png"
    assert index.find("../a.png") is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("img/Scan.png", "'set/img/scan.PNG': write the name as it is, in the same case"),
        ("scan.PNG", "'set/img/scan.PNG': write its path from the folder set"),
        ("img/scan.jpg", "'set/img/scan.PNG'"),
        ("other.png", "2 files, and none of a name like it"),
    ],
)
def test_a_missing_image_is_answered_with_the_nearest_name(
    tmp_path: Path, path: str, words: str
) -> None:
    members = {"set/rows.jsonl": jsonl(question(path)), "set/img/scan.PNG": RED}
    [fault] = take(tmp_path, zipped(members)).faults
    assert fault.code == "image_missing"
    assert path in fault.detail
    assert words in fault.detail


# --- made by the programs themselves


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a person has it on macOS: a name with an accent, and what Finder left."""
    top = tmp_path / "my set"
    (top / "img").mkdir(parents=True)
    (top / "rows.jsonl").write_bytes(jsonl(question(f"img/{COMPOSED}"), question("img/b.png")))
    (top / "img" / unicodedata.normalize("NFD", COMPOSED)).write_bytes(RED)
    (top / "img" / "b.png").write_bytes(GREY)
    (top / "img" / "._b.png").write_bytes(APPLE_DOUBLE)
    (top / "._rows.jsonl").write_bytes(APPLE_DOUBLE)
    (top / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    return top


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
@pytest.mark.parametrize("packed", [("-cf", "tar"), ("-czf", "tar.gz"), ("-cJf", "tar.xz")])
@pytest.mark.parametrize("what", ["my set", "."])
@pytest.mark.skipif(shutil.which("tar") is None, reason="has no tar")
def test_a_folder_packed_by_tar_is_read(
    tmp_path: Path, folder: Path, form: str, packed: tuple[str, str], what: str
) -> None:
    flag, end = packed
    target = tmp_path / f"set.{end}"
    place = folder.parent if what == "my set" else folder
    command = ["tar", f"--format={form}", "-C", str(place), flag, str(target), what]
    subprocess.run(command, check=True)
    taken = take(tmp_path, target.read_bytes())
    assert (taken.num_rows, taken.num_images, taken.num_bad_rows) == (2, 2, 0)
    assert "unused_files" not in taken.details
    assert len(taken_rows(tmp_path)) == 2


@pytest.mark.parametrize("options", [("-r",), ("-r", "-0"), ("-r", "-UN=UTF8"), ("-r", "-X")])
@pytest.mark.skipif(shutil.which("zip") is None, reason="has no zip")
def test_a_folder_packed_by_zip_is_read(
    tmp_path: Path, folder: Path, options: tuple[str, ...]
) -> None:
    target = tmp_path / "set.zip"
    command = ["zip", "-q", *options, str(target), folder.name]
    subprocess.run(command, check=True, cwd=folder.parent)
    taken = take(tmp_path, target.read_bytes())
    assert (taken.num_rows, taken.num_images, taken.num_bad_rows) == (2, 2, 0)
    assert "unused_files" not in taken.details


def test_a_tar_of_macos_with_its_own_headers_is_read(tmp_path: Path) -> None:
    """`tar` of macOS writes an AppleDouble before each file, and attributes as pax headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        for name, data in {
            "./._rows.jsonl": APPLE_DOUBLE,
            "./rows.jsonl": jsonl(question(COMPOSED)),
            f"./._{DECOMPOSED}": APPLE_DOUBLE,
            f"./{DECOMPOSED}": RED,
        }.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), stat.S_IFREG | 0o644
            info.pax_headers = {"LIBARCHIVE.xattr.com.apple.provenance": "AQAA", "mtime": "1.5"}
            archive.addfile(info, io.BytesIO(data))
    taken = take(tmp_path, buffer.getvalue())
    assert (taken.num_rows, taken.num_images) == (1, 1)
    assert "unused_files" not in taken.details
