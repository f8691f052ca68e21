"""Adapters on the wire."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from api.schemas.fields import Answer, Body, Id, Name
from grit_core.compression_job import COMPRESSION_CHECKS, DEFAULT_MAX_KL, DEFAULT_NUM_ROWS
from store.models import AdapterOrigin

_MAX_KL, _ROWS = COMPRESSION_CHECKS["max_kl"], COMPRESSION_CHECKS["num_rows"]


class AdapterCompress(Body):
    """Cut an adapter's weakest directions into a new adapter; the old one stays as it is."""

    max_kl: Annotated[float, Field(strict=True, gt=_MAX_KL.low, le=_MAX_KL.high)] = DEFAULT_MAX_KL
    """Directions are cut as long as the predicted divergence from the adapter as it is, in nats for
    a label token, stays at or below this."""
    dataset: Id | None = None
    """Rows on which curvature is measured. None: the dataset that the adapter was trained on."""
    num_rows: Annotated[int, Field(strict=True, ge=int(_ROWS.low), le=int(_ROWS.high))] = (
        DEFAULT_NUM_ROWS
    )
    """At most so many of its rows."""
    name: Name | None = None
    """What you call the job, and the new adapter."""


class AdapterRead(Answer):
    """A trained, compressed or imported adapter."""

    id: str
    """Id of the adapter, `adp_...`."""
    name: str | None
    """What its team calls it; null: it has no name."""
    model: str
    """The base model that it belongs to, as `GET /models` lists it."""
    job: str | None
    """The job that made it; null: it was imported, or the job is deleted."""
    parent: str | None
    """The adapter that this one was cut from; none once that one is deleted."""
    origin: AdapterOrigin
    """`job`: a training made it; `compression`: cut from `parent`; `import`: uploaded."""
    sha256: str | None
    """Of `adapter_model.safetensors`."""
    size_bytes: int | None
    """Bytes of all its stored files."""
    trainable_parameters: int | None
    """As stored: after compaction, those that are left."""
    ranks: dict[str, int] | None
    """By layer, of compacted and imported adapters; none: each layer has its plan's."""
    details: dict[str, Any] | None
    """What else is known of it, such as the `ranks` of an import."""
    created_at: datetime
    """When it was stored."""
    links: dict[str, str]
    """Paths of the adapter and of what belongs to it."""


class AdapterPage(Answer):
    """Some adapters, newest first."""

    data: list[AdapterRead]
    """The adapters of this page."""
    next: str | None
    """Cursor of the next page; null: these were the last."""
