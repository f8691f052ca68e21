"""Dataset rows from JSON lines, decoded values and local files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from grit_core.json_text import InvalidJson, decode
from grit_core.records.chat import ChatRecord
from grit_core.records.faults import InvalidRecord, RowFault
from grit_core.records.image_files import ResolveImage, images_beside
from grit_core.records.prompt_reader import PromptReader
from grit_core.records.row_reader import RowReader

MAX_LINE_BYTES: Final = 64 * 1024**2
"""Longest line of a JSONL file: a row with its images inside."""
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


def is_blank_line(data: bytes) -> bool:
    """Tell whether a line of JSONL holds no row."""
    return not data.removeprefix(BYTE_ORDER_MARK).strip()


def parse_line(data: bytes, *, line: int, resolve_image: ResolveImage) -> ChatRecord:
    """Read one line of JSONL (as `parse_record`, from bytes, with strict JSON).

    A byte order mark before the row is passed over: programs on Windows begin files with one, and
    files that were joined have it in the middle.

    Raises:
        InvalidRecord: If the line is too long, is not strict JSON, or is not a usable row.
    """
    if len(data) > MAX_LINE_BYTES:
        detail = f"The line has {len(data)} bytes; at most {MAX_LINE_BYTES} are read."
        raise InvalidRecord((RowFault(line, "", "line_too_long", detail),))
    try:
        value = decode(data.removeprefix(BYTE_ORDER_MARK))
    except InvalidJson as error:
        fault = RowFault(line, error.pointer, error.code, error.detail)
        raise InvalidRecord((fault,)) from None
    return parse_record(value, line=line, resolve_image=resolve_image)


def parse_record(value: Any, *, line: int, resolve_image: ResolveImage) -> ChatRecord:
    """Read one row.

    Args:
        value: The decoded JSON (or Parquet) row.
        line: Its number in the file, from 1, for messages.
        resolve_image: Finds the bytes of images that the row names by a relative path.

    Raises:
        InvalidRecord: With every fault of the row, not only the first.
    """  # noqa: DOC502 - raised by the reader
    return RowReader(line=line, resolve_image=resolve_image).read(value)


def parse_prompt(messages: Any) -> ChatRecord:
    """Read a chat that the assistant is to answer: as a row, without an assistant's turn to learn.

    Args:
        messages: The decoded list of turns; images as data URLs, calls of tools as objects of
            `name`, `arguments` (an object) and `id`.

    Raises:
        InvalidRecord: With every fault of the chat.
    """  # noqa: DOC502 - raised by the reader
    return PromptReader().read({"messages": messages})


def read_records(path: Path) -> Iterator[ChatRecord]:
    """Yield the rows of a local JSONL file; relative image paths start at its folder.

    The first row that cannot be used ends it with `InvalidRecord`.
    """
    resolve = images_beside(path)
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            if not is_blank_line(data):
                yield parse_line(data.rstrip(b"\r\n"), line=line, resolve_image=resolve)
