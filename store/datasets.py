"""Datasets as their team sees them."""

from typing import Any

from sqlalchemy.orm import Session

from store.models import Dataset, DatasetStatus
from store.pages import Page


def create_dataset(  # noqa: PLR0913 - the columns of one row
    session: Session,
    *,
    team: str,
    status: DatasetStatus,
    id: str | None = None,  # noqa: A002 - the vocabulary's word for it
    name: str | None = None,
    object_key: str | None = None,
    sha256: str | None = None,
    size_bytes: int | None = None,
    num_rows: int | None = None,
    num_bad_rows: int | None = None,
    num_images: int | None = None,
    details: dict[str, Any] | None = None,
    report: list[dict[str, Any]] | None = None,
) -> Dataset:
    """Record an uploaded dataset; its object is already stored."""
    raise NotImplementedError


def get_dataset(session: Session, dataset_id: str, *, team: str) -> Dataset:
    """Return a team's dataset.

    Raises:
        NotFound: If there is none, or it is another team's.
    """
    raise NotImplementedError


def list_datasets(
    session: Session, *, team: str, cursor: str | None = None, limit: int = 50
) -> Page[Dataset]:
    """Return a page of a team's datasets, newest first.

    Raises:
        InvalidCursor: If the cursor is not one of ours.
    """
    raise NotImplementedError


def delete_dataset(session: Session, dataset_id: str, *, team: str) -> str | None:
    """Delete a dataset that no job names.

    Returns:
        The key of an object that no other dataset needs, for the caller to delete after the commit.

    Raises:
        NotFound: If the team has no such dataset.
        StillReferenced: If a job names it.
    """
    raise NotImplementedError


def stored_bytes(session: Session, *, team: str) -> int:
    """Return the bytes of all datasets and adapters of a team."""
    raise NotImplementedError
