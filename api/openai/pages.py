"""Lists as OpenAI pages them: `after` is the id of the last row that the caller has."""

from typing import Annotated

from fastapi import Query

from api.errors import InvalidRequest, Item
from store.ids import is_id
from store.pages import encode_cursor

MAX_ROWS = 200
"""Of one page, whatever `limit` says: `has_more` tells that there are more."""

After = Annotated[str | None, Query(max_length=200, description="Id of the last row you have.")]
Rows = Annotated[int, Query(ge=1, le=10_000, description="Rows of a page; 200 at most come.")]


def cursor_after(after: str | None, *, kind: str) -> str | None:
    """Return our cursor for a row's id.

    Raises:
        InvalidRequest: If it is no id of this kind.
    """
    if after is None:
        return None
    if not is_id(after, kind):
        raise unknown_after(after, f"the id of a row of this list ({kind}_...)")
    return encode_cursor(after)


def unknown_after(after: str, expected: str) -> InvalidRequest:
    """Return the problem of an `after` that is not what it should be."""
    detail = f"`after` is not {expected}; send the last id of the page before."
    return InvalidRequest([
        Item(code="value_invalid", detail=detail, parameter="query.after", input=after)
    ])
