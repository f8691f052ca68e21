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
    name: str | None
    status: DatasetStatus
    sha256: str | None
    """Of the stored rows."""
    size_bytes: int | None
    num_rows: int | None
    num_bad_rows: int | None
    num_images: int | None
    details: dict[str, Any] | None
    """The uploaded file's name and format, columns that were ignored, images that no row names;
    `notes` says in sentences what a reader should know."""
    created_at: datetime
    links: dict[str, str]


class DatasetPage(Answer):
    """Some datasets, newest first."""

    data: list[DatasetRead]
    next: str | None


class BadRow(Answer):
    """One fault of one row."""

    line: int
    pointer: str
    code: str
    detail: str
    image: int | None = None


class ReportRead(Answer):
    """Every bad row of an upload."""

    dataset: str
    status: DatasetStatus
    num_rows: int | None
    num_bad_rows: int | None
    complete: bool
    """False when the report was cut at its bound."""
    errors: list[BadRow]
