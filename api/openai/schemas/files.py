"""`/v1/files` on the wire."""

from typing import Literal

from api.schemas.fields import Answer


class OpenAIFile(Answer):
    """An uploaded dataset."""

    id: str
    """The dataset's id: `GET /datasets/{id}` knows it too."""
    object: Literal["file"] = "file"
    """Always `file`."""
    bytes: int
    """Of the stored rows, whose images are inside; 0 when the upload was refused."""
    created_at: int
    """Seconds since 1970."""
    filename: str
    """The name that was sent with the upload."""
    purpose: Literal["fine-tune"] = "fine-tune"
    """Always `fine-tune`."""
    status: Literal["uploaded", "processed", "error"]
    """`processed`, or `error` of a refused upload."""
    status_details: str | None
    """Why a refused upload cannot be used."""


class OpenAIFileList(Answer):
    """Some files, newest first."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[OpenAIFile]
    """The files of this page."""
    first_id: str | None
    """Id of the page's first file; null on an empty page."""
    last_id: str | None
    """`after` of the next page."""
    has_more: bool
    """Whether there is another page."""
