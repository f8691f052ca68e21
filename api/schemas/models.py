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
    """What jobs write as `model`."""
    source: str
    """The folder or hub id that it is loaded from."""
    status: ModelStatus
    """`registering` until its layers are known, then `ready`, or `failed` with a `failure`."""
    inventory_hash: str | None
    """Hash of its adaptable layers; null: they are not known yet."""
    model_type: str | None
    """Its `model_type`, as in `config.json`."""
    total_parameters: int | None
    """All parameters of the model."""
    num_layers: int | None
    """Adaptable linear layers."""
    probe: ModelProbe | None
    """What trying it out showed; null: it has not been tried."""
    failure: dict[str, Any] | None
    """Why it cannot be used; null: it can, or is not known yet."""
    created_at: datetime
    """When it was registered."""
    ready_at: datetime | None
    """When its layers were known; null: they are not yet."""
    links: dict[str, str]
    """Paths of the model and of its layers."""


class ModelList(Answer):
    """The base models of this deployment, by id."""

    data: list[ModelRead]
    """The registered base models."""
    allowed: list[str]
    """Patterns of further hub ids and folders that a job may name."""


class ModelLayers(Answer):
    """The adaptable layers of a base model."""

    model: str
    """Id of the base model."""
    inventory_hash: str
    """Hash of the layers."""
    modalities: dict[str, list[dict[str, Any]]]
    """The layers of each modality: name, block and sizes."""
    unsupported: dict[str, int]
    """Modules that hold weights and cannot adapt, such as stacked experts, counted by class."""
    bypassed: dict[str, str]
    """Linear layers that cannot adapt, by pattern, and why."""
