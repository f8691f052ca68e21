"""Query parameters that do not exist: a filter that is misspelled must not return everything."""

from collections.abc import Sequence
from typing import Final

from fastapi import Request
from fastapi.dependencies.models import Dependant

from api.errors import InvalidRequest, Item
from grit_core.config.bounds import did_you_mean, shown

BY_METADATA: Final = frozenset({"/jobs"})
"""Paths of the routes that take `metadata[key]=value`, which no schema of theirs can name."""


def query_names(dependant: Dependant) -> tuple[str, ...]:
    """Return the names of the query parameters that a route and what it depends on read."""
    own = tuple(field.alias for field in dependant.query_params)
    return own + tuple(name for each in dependant.dependencies for name in query_names(each))


def refuse_unknown_parameters(
    request: Request, known: Sequence[str], *, by_metadata: bool = False
) -> None:
    """Check the names in a query.

    Args:
        request: The request.
        known: The names that its route reads.
        by_metadata: It reads `metadata[...]` too, with names of the caller's own.

    Raises:
        InvalidRequest: With each name that is unknown, and the nearest that is not.
    """
    unknown = [
        name
        for name in request.query_params
        if name not in known
        and not (by_metadata and name.startswith("metadata[") and name.endswith("]"))
    ]
    if unknown:
        raise InvalidRequest([_fault(name, known) for name in unknown[:10]])


def _fault(name: str, known: Sequence[str]) -> Item:
    hint = did_you_mean(name, known) or f" Known parameters: {', '.join(known)}."
    return Item(
        code="field_unknown",
        detail=f"There is no query parameter {shown(name[:80])}.{hint}",
        parameter=f"query.{name[:80]}",
    )
