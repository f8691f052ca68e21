"""Adapters on the wire."""

from datetime import datetime
from typing import Any

from api.schemas.fields import Answer
from store.models import AdapterOrigin


class AdapterRead(Answer):
    """A trained adapter."""

    id: str
    name: str | None
    model: str
    job: str | None
    origin: AdapterOrigin
    sha256: str | None
    """Of `adapter_model.safetensors`."""
    size_bytes: int | None
    trainable_parameters: int | None
    details: dict[str, Any] | None
    created_at: datetime
    links: dict[str, str]


class AdapterPage(Answer):
    """Some adapters, newest first."""

    data: list[AdapterRead]
    next: str | None
