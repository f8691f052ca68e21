"""Datasets on the wire."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from api.schemas.fields import Answer
from store.models import DatasetStatus


class OnBadRows(StrEnum):
    """What an upload does with rows that cannot be used."""

    REJECT = "reject"
    SKIP = "skip"


class DatasetRead(Answer):
    """An uploaded dataset."""

    id: str
    """Id of the dataset, `ds_...`."""
    name: str | None
    """What its team calls it; null: it has no name."""
    status: DatasetStatus
    """`validating` until its rows are read, then `ready`, or `rejected`: its report says why."""
    sha256: str | None
    """Of the stored rows."""
    size_bytes: int | None
    """Bytes of the stored rows, images included."""
    num_rows: int | None
    """Number of usable rows."""
    num_bad_rows: int | None
    """Number of rows that cannot be used."""
    num_images: int | None
    """Number of images in the usable rows."""
    details: dict[str, Any] | None
    """The uploaded file's name and format, columns that were ignored, images that no row names;
    `notes` says in sentences what a reader should know."""
    created_at: datetime
    """When it was uploaded."""
    links: dict[str, str]
    """Paths of the dataset and of its report."""


class DatasetPage(Answer):
    """Some datasets, newest first."""

    data: list[DatasetRead]
    """The datasets of this page."""
    next: str | None
    """Cursor of the next page; null: these were the last."""


class BadRow(Answer):
    """One fault of one row."""

    line: int
    """Line of the uploaded file, from 1; of Parquet, the number of the row."""
    pointer: str
    """JSON pointer to the fault within the row."""
    code: str
    """Stable name of the reason."""
    detail: str
    """What is wrong, and the fix."""
    image: int | None = None
    """Index of the image within the row; null: the fault is not about an image."""


class ReportRead(Answer):
    """Every bad row of an upload."""

    dataset: str
    """Id of the dataset."""
    status: DatasetStatus
    """`ready` or `rejected`."""
    num_rows: int | None
    """Number of usable rows."""
    num_bad_rows: int | None
    """Number of rows that cannot be used."""
    complete: bool
    """False when the report was cut at its bound."""
    errors: list[BadRow]
    """The faults, in the order of the file."""
