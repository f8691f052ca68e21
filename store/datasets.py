"""Datasets as their team sees them."""

from typing import Any

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from store.errors import NotFound, StillReferenced
from store.ids import new_id
from store.models import Dataset, DatasetStatus, Job
from store.pages import Page, read_page


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
    dataset = Dataset(
        id=id or new_id("ds"),
        team=team,
        status=status,
        name=name,
        object_key=object_key,
        sha256=sha256,
        size_bytes=size_bytes,
        num_rows=num_rows,
        num_bad_rows=num_bad_rows,
        num_images=num_images,
        details=details,
        report=report,
    )
    session.add(dataset)
    session.flush()
    return dataset


def get_dataset(session: Session, dataset_id: str, *, team: str) -> Dataset:
    """Return a team's dataset.

    Raises:
        NotFound: If there is none, or it is another team's.
    """
    dataset = session.scalars(
        select(Dataset).where(Dataset.id == dataset_id, Dataset.team == team)
    ).one_or_none()
    if dataset is None:
        raise NotFound("dataset", dataset_id)
    return dataset


def list_datasets(
    session: Session,
    *,
    team: str,
    name: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[Dataset]:
    """Return a page of a team's datasets, or of those of a name, newest first.

    Raises:
        InvalidCursor: If the cursor is not one of ours.
    """
    statement = select(Dataset).where(Dataset.team == team)
    if name is not None:
        statement = statement.where(Dataset.name == name)
    return read_page(session, statement, key=Dataset.id, cursor=cursor, limit=limit)


def delete_dataset(session: Session, dataset_id: str, *, team: str) -> str | None:
    """Delete a dataset that no job names.

    Returns:
        The key of an object that no other dataset needs, for the caller to delete after the commit.

    Raises:
        NotFound: If the team has no such dataset.
        StillReferenced: If a job names it.
    """
    # Locked, so that no job can name it between the check and the deletion.
    dataset = session.scalars(
        select(Dataset).where(Dataset.id == dataset_id, Dataset.team == team).with_for_update()
    ).one_or_none()
    if dataset is None:
        raise NotFound("dataset", dataset_id)
    named = or_(
        Job.dataset_id == dataset_id,
        Job.eval_dataset_id == dataset_id,
        Job.retention_dataset_id == dataset_id,
    )
    named_by = session.scalars(select(Job.id).where(named).limit(1)).one_or_none()
    if named_by is not None:
        raise StillReferenced("dataset", dataset_id, by=f"job {named_by}")
    session.execute(
        delete(Dataset).where(Dataset.id == dataset_id),
        execution_options={"synchronize_session": False},
    )
    session.expunge(dataset)
    # Equal uploads share one object, also across teams.
    shared = session.scalars(
        select(func.count()).where(Dataset.object_key == dataset.object_key)
    ).one()
    return None if shared else dataset.object_key


def unneeded_object(session: Session, object_key: str) -> bool:
    """Tell whether no dataset of any team has an object."""
    named = session.scalars(select(Dataset.id).where(Dataset.object_key == object_key).limit(1))
    return named.one_or_none() is None


def source_name(dataset: Dataset) -> str:
    """Return what its team calls the file of a dataset's rows, for messages that name a line."""
    details = dataset.details or {}
    file, rows_file = details.get("file_name"), details.get("rows_file")
    if file and rows_file:
        return f"{rows_file} in {file}"
    return str(file or rows_file or dataset.name or dataset.id)
