"""`/v1/models` on the wire."""

from typing import Literal

from api.schemas.fields import Answer


class ModelFacts(Answer):
    """What we know of a model and OpenAI's shape has no place for."""

    base_model: str
    """The model itself, or the one that the adapter belongs to."""
    name: str | None
    """What its team calls an adapter: the `suffix` of its job."""
    job: str | None
    """The job that made the adapter, as long as it is there."""


class OpenAIModel(Answer):
    """A base model that is ready, or an adapter of the caller's team."""

    id: str
    """What a request writes as `model`."""
    object: Literal["model"] = "model"
    """Always `model`."""
    created: int
    """Seconds since 1970."""
    owned_by: str
    """`grit` for a base model, the team for an adapter."""
    grit: ModelFacts
    """What OpenAI's shape has no place for."""


class OpenAIModelList(Answer):
    """Everything that `model` may name, in one page."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[OpenAIModel]
    """The base models and the adapters."""


class OpenAIDeleted(Answer):
    """What was deleted."""

    id: str
    """Id of what was deleted."""
    object: str
    """`file` or `model`."""
    deleted: Literal[True] = True
    """Always true."""
