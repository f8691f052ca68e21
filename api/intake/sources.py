"""The files that a dataset may come in, each as a stream of rows."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final, Protocol

from api.intake.archives import BROKEN, Archive, TarArchive, ZipArchive, inflate
from api.intake.refusal import Refused
from grit_core.images import MAX_IMAGE_BYTES
from grit_core.records import (
    MAX_LINE_BYTES,
    ChatRecord,
    InvalidRecord,
    RowFault,
    no_images,
    parse_line,
    parse_record,
)

MAX_ROWS: Final = 10_000_000
_BATCH_ROWS: Final = 64
_MAX_ROW_GROUP_BYTES: Final = 4 * 1024**3

Row = ChatRecord | InvalidRecord
"""A row that can be trained on, or all that is wrong with it."""


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
        return file.read(512)


def _refuse_binary(head: bytes) -> None:
    start = head.lstrip()[:1]
    if not head.strip():
        raise Refused("empty_dataset", "The file is empty; a dataset has at least one row.")
    if start == b"[":
        raise Refused(
            "dataset_invalid", "The file is a JSON list; write one object a line (JSONL)."
        )
    if any(byte < 32 and byte not in b"\t\r\n" for byte in head) and start != b"{":
        detail = "The file is none of JSONL, zip, tar (also .gz, .bz2, .xz) and Parquet."
        raise Refused("format_not_allowed", detail)


class JsonlSource:
    """One object a line, images inside as data URLs."""

    format = "jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path

    def rows(self) -> Iterator[Row]:
        """Yield every row."""
        with self._path.open("rb") as file:
            for line, data in lines_of(file):
                yield _row(line, data, no_images)

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
        self._folder = PurePosixPath(self._name).parent
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
                    yield _row(line, data, self._resolve)
        except BROKEN:
            raise Refused("dataset_invalid", f"The archive is broken after line {line}.") from None

    def _resolve(self, name: str) -> bytes:
        beside = str(self._folder / PurePosixPath(name))
        found = next((each for each in (beside, name) if each in self._archive.names), None)
        if found is None:
            raise LookupError(name)
        self._used.add(found)
        return self._archive.read(found, max_bytes=MAX_IMAGE_BYTES)

    def details(self) -> dict[str, Any]:
        """Return the files that no row named."""
        unused = sorted(self._archive.names - self._used - {self._name})
        return {"unused_files": len(unused), "unused_file_names": unused[:20]} if unused else {}


class ParquetSource:
    """A Parquet file with `messages` and, in Hugging Face's way, `images` columns."""

    format = "parquet"

    def __init__(self, path: Path) -> None:
        """Open it and look for its columns.

        Raises:
            Refused: If it is broken or has no `messages`.
        """
        # Loaded with the first such upload and not with the service.
        import pyarrow as pa  # noqa: PLC0415 - see above
        import pyarrow.parquet as pq  # noqa: PLC0415 - see above

        try:
            self._file = pq.ParquetFile(path)
            columns = list(self._file.schema_arrow.names)
        except (pa.ArrowException, OSError, ValueError):
            raise Refused("dataset_invalid", "The Parquet file is broken.") from None
        self._broken = (pa.ArrowException, OSError, ValueError)
        if "messages" not in columns:
            detail = (
                f"The Parquet file has no column `messages`; it has: {', '.join(columns)[:300]}."
            )
            raise Refused("dataset_invalid", detail)
        metadata = self._file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        if any(group.total_byte_size > _MAX_ROW_GROUP_BYTES for group in groups):
            detail = f"A row group has more than {_MAX_ROW_GROUP_BYTES} bytes; write smaller ones."
            raise Refused("archive_limits", detail)
        self._columns = [name for name in ("messages", "images") if name in columns]
        self._ignored = [name for name in columns if name not in self._columns]

    def rows(self) -> Iterator[Row]:
        """Yield every row; its number stands for its line.

        Raises:
            Refused: If the file is broken further on.
        """
        number = 0
        try:
            for batch in self._file.iter_batches(batch_size=_BATCH_ROWS, columns=self._columns):
                for value in batch.to_pylist():
                    number += 1
                    _refuse_count(number)
                    try:
                        yield parse_record(
                            _without_null(value), line=number, resolve_image=no_images
                        )
                    except InvalidRecord as error:
                        yield error
        except self._broken:
            raise Refused(
                "dataset_invalid", f"The Parquet file is broken after row {number}."
            ) from None

    def details(self) -> dict[str, Any]:
        """Return the columns that nobody reads."""
        return (
            {"ignored_columns": [repr(name)[1:-1] for name in self._ignored]}
            if self._ignored
            else {}
        )


def _without_null(value: Any) -> Any:
    """Drop the nulls that stand for absent fields, since Parquet gives every struct every field."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value


def lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines that are not blank; a line beyond its bound is cut, never held whole."""
    line = 0
    while data := file.readline(MAX_LINE_BYTES + 2):
        line += 1
        _refuse_count(line)
        rest = data
        while not rest.endswith(b"\n") and len(data) > MAX_LINE_BYTES:
            rest = file.readline(MAX_LINE_BYTES)
            if not rest:
                break
        if data.strip():
            yield line, data.rstrip(b"\r\n")


def _row(line: int, data: bytes, resolve: Any) -> Row:
    try:
        return parse_line(data, line=line, resolve_image=resolve)
    except InvalidRecord as error:
        return error
    except BROKEN as error:
        # A member whose bytes are broken: the archive says so only when it is read.
        detail = f"A file of this row cannot be read from the archive ({type(error).__name__})."
        return InvalidRecord((RowFault(line, "", "image_corrupt", detail),))


def _refuse_count(count: int) -> None:
    if count > MAX_ROWS:
        raise Refused("archive_limits", f"A dataset has at most {MAX_ROWS} rows.")
