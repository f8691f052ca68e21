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


class ModelProbe(Answer):
    """What trying a base model out showed when it was registered."""

    takes_text_only: bool
    """Whether rows without an image can be trained on."""
    max_images: int
    """Most images of a row that was tried: 0, 1 or 2."""
    image_tokens: int | None
    """Tokens of the one small image that was tried."""
    default_layers: int
    """Layers that adapt by default; 0 when a job needs layer_patterns of its own."""
    notes: list[str]
    """What stops no job and should be known before one."""


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
    probe: ModelProbe | None
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
    unsupported: dict[str, int]
    """Modules that hold weights and cannot adapt, such as stacked experts, counted by class."""
    bypassed: dict[str, str]
    """Linear layers that cannot adapt, by pattern, and why."""
