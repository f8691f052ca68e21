"""A page of rows, newest first, and the opaque cursor to the next one."""

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

from store.errors import InvalidCursor

Row = TypeVar("Row")

_VERSION: Final = b"1:"


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Some rows, and the cursor of the rows after them (none: these were the last)."""

    rows: list[Row]
    next: str | None


def read_page(
    session: Session,
    statement: Select[Any],
    *,
    key: InstrumentedAttribute[str],
    cursor: str | None,
    limit: int,
    make: Callable[[Any], Row] | None = None,
) -> Page[Row]:
    """Return the rows of a statement that are older than the cursor, by an id that sorts by time.

    A page is cut at an id and not at an offset, so rows that arrive meanwhile shift nothing. `make`
    makes a row of the selected columns; without it the first one is the row.

    Raises:
        InvalidCursor: If we did not write the cursor.
        ValueError: If the limit is not positive.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if cursor is not None:
        statement = statement.where(key < decode_cursor(cursor))
    found = session.execute(statement.order_by(key.desc()).limit(limit + 1))
    rows: list[Any] = [make(row) for row in found] if make else list(found.scalars())
    more = len(rows) > limit
    rows = rows[:limit]
    return Page(rows, encode_cursor(getattr(rows[-1], key.key)) if more else None)


def encode_cursor(last_id: str) -> str:
    """Return the opaque cursor of the rows older than an id."""
    return base64.urlsafe_b64encode(_VERSION + last_id.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """Return the id behind a cursor.

    Raises:
        InvalidCursor: If we did not write it.
    """
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        text = raw.removeprefix(_VERSION).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise InvalidCursor("The page cursor is not one that this service wrote.") from error
    if not raw.startswith(_VERSION) or not text.isprintable() or len(text) > 64:
        raise InvalidCursor("The page cursor is not one that this service wrote.")
    return text
