"""What the service answers, as plain typed dictionaries: the JSON of the HTTP contract, unchanged.

Keys that a newer service adds are kept; nothing is validated twice. Times are RFC 3339 UTC texts.
"""

from typing import Any, Literal, TypedDict

Status = Literal[
    "created", "queued", "running", "pausing", "paused",
    "cancelling", "cancelled", "succeeded", "failed",
]  # fmt: skip

ENDED: frozenset[str] = frozenset({"cancelled", "succeeded", "failed"})
"""Statuses that a job leaves only when somebody asks for it."""


class Progress(TypedDict, total=False):
    """How far a running job has come."""

    checked_rows: int | None
    rows_to_check: int | None
    step: int
    total_steps: int
    epoch: float
    percent: float
    train_loss: float | None
    eval_loss: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    elapsed_seconds: float | None
    remaining_seconds: float | None


class JobError(TypedDict, total=False):
    """Why a job failed."""

    code: str
    category: Literal["user", "system"]
    message: str
    hint: str
    retryable: bool


class Retention(TypedDict, total=False):
    """What training did to what the model could do before: losses on the retention dataset."""

    dataset: str
    loss_before: float | None
    loss_after: float | None


class Compaction(TypedDict, total=False):
    """What cutting an adapter's weakest directions changed."""

    ranks: dict[str, int]
    parameters_before: int
    parameters_after: int
    predicted_kl: float | None
    measured_kl: float | None
    max_kl: float
    eval_loss_before: float | None
    eval_loss_after: float | None


class Result(TypedDict, total=False):
    """What a job made."""

    adapter: str | None
    final_loss: float | None
    trainable_parameters: int | None
    effective_rank: dict[str, float] | None
    retention: Retention | None
    compaction: Compaction | None


class Job(TypedDict, total=False):
    """A request to fine-tune, or to compress an adapter, and where it stands."""

    id: str
    kind: Literal["training", "compression"]
    status: Status
    phase: str | None
    status_reason: str | None
    model: str
    dataset: str
    eval_dataset: str | None
    retention_dataset: str | None
    source_adapter: str | None
    compression: dict[str, Any] | None
    preset: str | None
    config: dict[str, Any]
    training: dict[str, Any]
    device: str | None
    device_reason: str | None
    name: str | None
    metadata: dict[str, str]
    priority: int
    team: str
    attempt: int
    max_attempts: int
    created_at: str
    started_at: str | None
    finished_at: str | None
    progress: Progress | None
    queue: dict[str, Any] | None
    plan: dict[str, Any] | None
    result: Result | None
    error: JobError | None
    links: dict[str, str]


class Event(TypedDict, total=False):
    """An immutable numbered fact about a job."""

    sequence: int
    type: str
    attempt: int | None
    created_at: str
    payload: dict[str, Any]


class Dataset(TypedDict, total=False):
    """Uploaded rows."""

    id: str
    name: str | None
    status: str
    sha256: str | None
    size_bytes: int | None
    num_rows: int | None
    num_bad_rows: int | None
    num_images: int | None
    details: dict[str, Any] | None
    created_at: str
    links: dict[str, str]


class BaseModel(TypedDict, total=False):
    """A base model that jobs may name."""

    id: str
    source: str
    status: Literal["registering", "ready", "failed"]
    inventory_hash: str | None
    model_type: str | None
    total_parameters: int | None
    num_layers: int | None
    probe: dict[str, Any] | None
    failure: dict[str, Any] | None
    created_at: str
    ready_at: str | None
    links: dict[str, str]


class Adapter(TypedDict, total=False):
    """The result of a job: a PEFT folder."""

    id: str
    name: str | None
    model: str
    job: str | None
    parent: str | None
    origin: str
    sha256: str | None
    size_bytes: int | None
    trainable_parameters: int | None
    ranks: dict[str, int] | None
    details: dict[str, Any] | None
    created_at: str
    links: dict[str, str]


class Generation(TypedDict, total=False):
    """An answer of `POST /infer`."""

    id: str
    model: str
    adapter: str | None
    output: str
    tool_calls: list[dict[str, Any]] | None
    finish_reason: str
    usage: dict[str, int]
    timing: dict[str, float]


class ApiKey(TypedDict, total=False):
    """A key; the secret text is in the answer that created it and nowhere else."""

    id: str
    name: str
    team: str
    scopes: list[str]
    prefix: str
    key: str
    created_at: str
    expires_at: str | None
    last_used_at: str | None
    revoked_at: str | None
    replaced_by: str | None


class Team(TypedDict, total=False):
    """A team: what applies to it, what was set for it alone, and what it has."""

    name: str
    created_at: str
    limits: dict[str, int | None]
    own_limits: dict[str, int | None]
    usage: dict[str, int]
