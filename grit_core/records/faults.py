"""What is wrong with a row, and how its values are named in words."""

from dataclasses import dataclass
from math import isnan
from typing import Any, Final

from grit_core.errors import InvalidDataset

Path = tuple[str | int, ...]
"""Keys and indices from a row down to one of its values."""

_NAMES: Final[dict[type, str]] = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}

_NOTHING: Final = frozenset({"[]", "{}", "null"})
"""Texts of exporters that write JSON into a column."""
_SHORT: Final = 16


@dataclass(frozen=True, slots=True)
class RowFault:
    """One thing wrong with one row: where, a stable code, and what to do."""

    line: int
    pointer: str
    code: str
    detail: str
    image: int | None = None
    """Index of the image in the row, when the fault is one image's."""


class InvalidRecord(InvalidDataset):
    """A row cannot be used; `row_faults` holds everything that is wrong with it."""

    def __init__(self, row_faults: tuple[RowFault, ...]) -> None:
        lines = [
            f"line {fault.line}, {fault.pointer or '/'}: {fault.detail}" for fault in row_faults
        ]
        super().__init__("\n".join(lines))
        self.row_faults = row_faults


def kind_name(value: Any) -> str:
    """Return a JSON type's name with its article."""
    return _NAMES.get(type(value), f"a {type(value).__name__}")


def shown_name(name: str) -> str:
    """Return a name from a row, short and in ASCII, for a message."""
    return name[:80].encode("ascii", "backslashreplace").decode()


def is_empty(value: Any) -> bool:
    """Tell whether a value says nothing: null, false, an empty text, list or object, or only such.

    Parquet writes every field of every struct, and exporters write `[]` or the text "[]"; a number
    that is missing among others is NaN.
    """
    if value is None or value is False or (isinstance(value, float) and isnan(value)):
        return True
    if isinstance(value, str):
        # Not stripped whole: a text may be a megabyte.
        short = len(value) <= _SHORT and value.strip() in _NOTHING
        return short or not value or value.isspace()
    if isinstance(value, bytes):
        return not value
    if isinstance(value, dict):
        return all(is_empty(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_empty(item) for item in value)
    return False


def holds_false(value: Any) -> bool:
    """Tell whether a value is false, or holds it: where a switch is meant, that says something."""
    if isinstance(value, dict):
        return any(holds_false(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(holds_false(item) for item in value)
    return value is False
