"""The files that a dataset may come in, each as a stream of rows."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from api.intake.archives import BROKEN, Archive, TarArchive, ZipArchive, inflate
from api.intake.member_names import MemberIndex
from api.intake.parquet import ParquetSource
from api.intake.refusal import Refused
from api.intake.rows import Row, read_line, refuse_count
from grit_core.images import MAX_IMAGE_BYTES
from grit_core.records import (
    BYTE_ORDER_MARK,
    MAX_LINE_BYTES,
    ImageNotFound,
    foreign_format,
    is_blank_line,
    no_images,
)

_HEAD_BYTES: Final = 64 * 1024
_WIDE_MARKS: Final = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
"""How texts in UTF-16 and UTF-32 begin."""


class Source(Protocol):
    """An uploaded file, opened."""

    format: str

    def rows(self) -> Iterator[Row]:
        """Yield every row, good or bad, in order."""

    def details(self) -> dict[str, Any]:
        """Return what a user should know of the file, once the rows are read."""


def open_source(path: Path, scratch: Path, stack: ExitStack) -> Source:
    """Open an upload by what its first bytes say it is; what we cannot read is refused."""
    head = _head(path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        zipped = ZipArchive(path)
        stack.callback(zipped.close)
        return ArchiveSource(zipped, format="zip")
    if head.startswith(b"PAR1"):
        return ParquetSource(path)
    inflated = scratch / "inflated"
    if inflate(path, inflated):
        path, head = inflated, _head(inflated)
    if head[257:262] == b"ustar":
        tar = TarArchive(path)
        stack.callback(tar.close)
        return ArchiveSource(tar, format="tar")
    _refuse_binary(head)
    return JsonlSource(path)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _refuse_binary(head: bytes) -> None:
    _refuse_wide(head)
    head = head.removeprefix(BYTE_ORDER_MARK)
    start = head.lstrip()[:1]
    if start == b"[":
        detail = "The file is a JSON list; write one object a line (JSONL)."
        raise Refused("dataset_invalid", f"{detail} {_format_of_list(head)}".rstrip())
    whole, head = head, head[:512]
    if any(byte < 32 and byte not in b"\t\r\n" for byte in head) and start != b"{":
        detail = "The file is none of JSONL, zip, tar (also .gz, .bz2, .xz) and Parquet."
        raise Refused("format_not_allowed", detail)
    first = head.strip().partition(b"\n")[0]
    if b"{" not in whole and any(mark in first for mark in (b",", b";", b"\t")):
        detail = "The file is a table such as CSV; write each of its lines as a chat row in JSONL."
        raise Refused("format_not_allowed", detail)


def _refuse_wide(head: bytes) -> None:
    """Refuse a text in UTF-16 or UTF-32, with a byte order mark or without.

    Raises:
        Refused: It is one.
    """
    first = head[:4]
    is_unmarked = b"\x00" in first and first.strip(b"\x00")[:1] in {b"{", b"["}
    if head.startswith(_WIDE_MARKS) or is_unmarked:
        detail = "The file is text in UTF-16 or UTF-32; save it as UTF-8 and upload it again."
        raise Refused("format_not_allowed", detail)


def _format_of_list(head: bytes) -> str:
    """Return what format the first row of a JSON list is in, if it is a known one."""
    text = head.decode("utf-8", "ignore").lstrip()[1:].lstrip()
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return ""
    known = foreign_format(value) if isinstance(value, dict) and "messages" not in value else None
    return "" if known is None else known.detail


class JsonlSource:
    """One object a line, images inside as data URLs."""

    format = "jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path

    def rows(self) -> Iterator[Row]:
        """Yield every row."""
        with self._path.open("rb") as file:
            for line, data in lines_of(file):
                yield read_line(line, data, no_images)

    def details(self) -> dict[str, Any]:
        """Return nothing more."""
        return {}


class ArchiveSource:
    """A zip or tar of one JSONL file and the images that it names."""

    def __init__(self, archive: Archive, *, format: str) -> None:  # noqa: A002 - the wire's word
        """Find the one JSONL file.

        Raises:
            Refused: If there is none, or more than one.
        """
        self.format = format
        self._archive = archive
        found = sorted(name for name in archive.names if name.lower().endswith(".jsonl"))
        if len(found) != 1:
            named = ", ".join(found[:5]) or "none"
            detail = f"An archive holds exactly one .jsonl file; this one: {named}."
            raise Refused("dataset_invalid", detail)
        self._name = found[0]
        self._index = MemberIndex(archive.names, rows_name=self._name)
        self._used: set[str] = set()

    def rows(self) -> Iterator[Row]:
        """Yield every row.

        Raises:
            Refused: If the archive is broken in the middle of its rows.
        """
        line = 0
        try:
            with self._archive.open(self._name) as file:
                for line, data in lines_of(file):
                    yield read_line(line, data, self._resolve)
        except BROKEN:
            raise Refused("dataset_invalid", f"The archive is broken after line {line}.") from None

    def _resolve(self, name: str) -> bytes:
        found = self._index.find(name)
        if found is None:
            raise ImageNotFound(name, self._index.hint(name))
        self._used.add(found)
        return self._archive.read(found, max_bytes=MAX_IMAGE_BYTES)

    def details(self) -> dict[str, Any]:
        """Return the name of the JSONL file, and the files that no row named."""
        details: dict[str, Any] = {"rows_file": self._name}
        unused = sorted(self._archive.names - self._used - {self._name})
        if unused:
            details |= {"unused_files": len(unused), "unused_file_names": unused[:20]}
        return details


def lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines that are not blank; a line beyond its bound is cut, never held whole.

    A text in UTF-16 is refused at its first line.
    """
    line = 0
    while data := file.readline(MAX_LINE_BYTES + 2):
        line += 1
        if line == 1:
            _refuse_wide(data)
        refuse_count(line)
        rest = data
        while not rest.endswith(b"\n") and len(data) > MAX_LINE_BYTES:
            rest = file.readline(MAX_LINE_BYTES)
            if not rest:
                break
        if not is_blank_line(data):
            yield line, data.rstrip(b"\r\n")
