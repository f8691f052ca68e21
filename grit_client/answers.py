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


class Job(TypedDict, total=False):
    """A request to fine-tune, and where it stands."""

    id: str
    status: Status
    phase: str | None
    status_reason: str | None
    model: str
    dataset: str
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
    result: dict[str, Any] | None
    error: JobError | None
    links: dict[str, str]


class Event(TypedDict, total=False):
    """An immutable numbered fact about a job."""

    sequence: int
    type: str
    at: str
    attempt: int | None
    data: dict[str, Any]


class Dataset(TypedDict, total=False):
    """Uploaded rows."""

    id: str
    name: str | None
    status: str
    num_rows: int
    num_bad_rows: int
    size_bytes: int
    sha256: str
    created_at: str


class BaseModel(TypedDict, total=False):
    """A base model that jobs may name."""

    id: str
    source: str
    status: Literal["registering", "ready", "failed"]
    reason: str | None
    model_type: str | None
    inventory_hash: str | None


class Adapter(TypedDict, total=False):
    """The result of a job: a PEFT folder."""

    id: str
    job: str | None
    model: str
    size_bytes: int
    sha256: str
    created_at: str


class Generation(TypedDict, total=False):
    """An answer of `POST /infer`."""

    id: str
    model: str
    adapter: str | None
    output: str
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
    last_used_at: str | None
    revoked_at: str | None
