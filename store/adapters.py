"""Adapters as their team sees them: what jobs made, and what was imported or merged."""

from typing import Any

from sqlalchemy.orm import Session

from store.models import Adapter, AdapterOrigin
from store.pages import Page


def create_adapter(  # noqa: PLR0913 - the columns of one row
    session: Session,
    *,
    team: str,
    origin: AdapterOrigin,
    model: str,
    prefix: str,
    id: str | None = None,  # noqa: A002 - the vocabulary's word for it
    job_id: str | None = None,
    name: str | None = None,
    sha256: str | None = None,
    size_bytes: int | None = None,
    trainable_parameters: int | None = None,
    details: dict[str, Any] | None = None,
) -> Adapter:
    """Record an adapter; its objects are already stored under `prefix`."""
    raise NotImplementedError


def get_adapter(session: Session, adapter_id: str, *, team: str) -> Adapter:
    """Return a team's adapter.

    Raises:
        NotFound: If there is none, or it is another team's.
    """
    raise NotImplementedError


def adapter_of_job(session: Session, job_id: str, *, team: str) -> Adapter | None:
    """Return the adapter that a team's job made, if it has made one."""
    raise NotImplementedError


def list_adapters(
    session: Session,
    *,
    team: str,
    model: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[Adapter]:
    """Return a page of a team's adapters, newest first.

    Raises:
        InvalidCursor: If the cursor is not one of ours.
    """
    raise NotImplementedError


def delete_adapter(session: Session, adapter_id: str, *, team: str) -> str:
    """Delete an adapter's row.

    Returns:
        The prefix of its objects, for the caller to delete after the commit.

    Raises:
        NotFound: If the team has no such adapter.
    """
    raise NotImplementedError
