"""Base models on the wire."""

from datetime import datetime
from typing import Any

from api.schemas.fields import Answer, Body, ModelName
from store.models import ModelStatus


class ModelCreate(Body):
    """Register a base model."""

    id: ModelName
    """What jobs write as `model`."""
    source: ModelName | None = None
    """An allowed folder or hub id; without it, the id itself."""


class ModelRead(Answer):
    """A base model."""

    id: str
    source: str
    status: ModelStatus
    inventory_hash: str | None
    model_type: str | None
    total_parameters: int | None
    num_layers: int | None
    """Adaptable linear layers."""
    failure: dict[str, Any] | None
    created_at: datetime
    ready_at: datetime | None
    links: dict[str, str]


class ModelList(Answer):
    """The base models of this deployment, by id."""

    data: list[ModelRead]
    allowed: list[str]
    """Patterns of further hub ids and folders that a job may name."""


class ModelLayers(Answer):
    """The adaptable layers of a base model."""

    model: str
    inventory_hash: str
    modalities: dict[str, list[dict[str, Any]]]
