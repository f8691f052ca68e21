"""One row of an upload: read, or all that is wrong with it."""

from typing import Any, Final

from api.intake.archives import BROKEN
from api.intake.refusal import Refused
from grit_core.records import (
    ChatRecord,
    InvalidRecord,
    ResolveImage,
    RowFault,
    no_images,
    parse_line,
    parse_record,
)

MAX_ROWS: Final = 10_000_000

Row = ChatRecord | InvalidRecord
"""A row that can be trained on, or all that is wrong with it."""


def read_line(line: int, data: bytes, resolve_image: ResolveImage) -> Row:
    """Return the row of a line of JSONL."""
    try:
        return parse_line(data, line=line, resolve_image=resolve_image)
    except InvalidRecord as error:
        return error
    except BROKEN as error:
        # A member whose bytes are broken: the archive says so only when it is read.
        detail = f"A file of this row cannot be read from the archive ({type(error).__name__})."
        return InvalidRecord((RowFault(line, "", "image_corrupt", detail),))


def read_value(number: int, value: Any) -> Row:
    """Return the row of a decoded value."""
    try:
        return parse_record(value, line=number, resolve_image=no_images)
    except InvalidRecord as error:
        return error


def refuse_count(count: int) -> None:
    """Refuse more rows than a dataset may have.

    Raises:
        Refused: There are.
    """
    if count > MAX_ROWS:
        raise Refused("archive_limits", f"A dataset has at most {MAX_ROWS} rows.")
