"""`/v1/files` on the wire."""

from typing import Literal

from api.schemas.fields import Answer


class OpenAIFile(Answer):
    """An uploaded dataset."""

    id: str
    """The dataset's id: `GET /datasets/{id}` knows it too."""
    object: Literal["file"] = "file"
    bytes: int
    """Of the stored rows, whose images are inside; 0 when the upload was refused."""
    created_at: int
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    """Why a refused upload cannot be used."""


class OpenAIFileList(Answer):
    """Some files, newest first."""

    object: Literal["list"] = "list"
    data: list[OpenAIFile]
    first_id: str | None
    last_id: str | None
    """`after` of the next page."""
    has_more: bool
