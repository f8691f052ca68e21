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
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    """`grit` for a base model, the team for an adapter."""
    grit: ModelFacts


class OpenAIModelList(Answer):
    """Everything that `model` may name, in one page."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class OpenAIDeleted(Answer):
    """What was deleted."""

    id: str
    object: str
    deleted: Literal[True] = True
