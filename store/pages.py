"""A page of rows, newest first, and the opaque cursor to the next one."""

from dataclasses import dataclass
from typing import Generic, TypeVar

Row = TypeVar("Row")


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Some rows, and the cursor of the rows after them (none: these were the last)."""

    rows: list[Row]
    next: str | None


def encode_cursor(last_id: str) -> str:
    """Return the opaque cursor of the rows older than an id."""
    raise NotImplementedError


def decode_cursor(cursor: str) -> str:
    """Return the id behind a cursor.

    Raises:
        InvalidCursor: If we did not write it.
    """
    raise NotImplementedError
