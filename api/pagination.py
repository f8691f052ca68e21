"""Pages: how many rows, where the last page ended, and rows of a name only."""

from typing import Annotated

from fastapi import Query

from api.errors import Item, Problem

Limit = Annotated[int, Query(ge=1, le=200, description="Rows of a page.")]
Cursor = Annotated[str | None, Query(max_length=200, description="The `next` of the page before.")]
NameFilter = Annotated[
    str | None, Query(max_length=200, description="Only what has exactly this name.")
]


def printable_filter(value: str | None, name: str) -> str | None:
    """Return the value of a filter; PostgreSQL refuses some characters that are not printable.

    Args:
        value: What the query holds.
        name: Of the parameter.

    Raises:
        parameter_fault: The problem of a value that is not printable.
    """
    if value is not None and not value.isprintable():
        raise parameter_fault(name, "has characters that are not printable")
    return value


def parameter_fault(name: str, what: str) -> Problem:
    """Return the problem of a parameter of a query.

    Args:
        name: Of the parameter.
        what: Is wrong with it, to be read after its name.
    """
    detail = f"`{name}` {what}."
    item = Item(code="value_invalid", detail=detail, parameter=f"query.{name}")
    return Problem("request_invalid", detail, errors=[item])
