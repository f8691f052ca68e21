"""Jobs on the wire."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from api.schemas.config import ModelGRITConfig, TrainingConfig
from api.schemas.fields import Answer, Body, Id, Line, ModelName, Name
from grit_core.job_spec import DEFAULT_EVAL_FRACTION
from store.models import JobKind, JobStatus

LayerNames = Annotated[
    list[Annotated[Line, Field(min_length=1, max_length=256)]], Field(min_length=1, max_length=1000)
]
MetadataKey = Annotated[Line, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[Line, Field(max_length=512)]


class JobCreate(Body):
    """A request to fine-tune."""

    model: ModelName
    """A registered base model, or a folder or hub id that this deployment allows."""
    dataset: Id
    """An uploaded dataset (`POST /datasets`)."""
    eval_dataset: Id | None = None
    """Another dataset to evaluate on; `eval_fraction` then takes nothing away."""
    eval_fraction: Annotated[float, Field(strict=True, ge=0, le=0.5)] = DEFAULT_EVAL_FRACTION
    """Share of the dataset held out for evaluation."""
    retention_dataset: Id | None = None
    """Rows of what the model can do already. They are never trained on; their loss before and after
    training is in the result, so that forgetting is seen."""
    preset: Annotated[Line, Field(min_length=1, max_length=100)] | None = None
    """A named configuration (`GET /presets`); `config` is laid over it field by field."""
    config: ModelGRITConfig | None = None
    """Which layers adapt, and how. Without a preset it must stand alone."""
    vision_layers: LayerNames | None = None
    """Exactly these vision layers (names or patterns), in place of the preset's choice."""
    text_layers: LayerNames | None = None
    """Exactly these text layers."""
    cross_modal_layers: LayerNames | None = None
    """Exactly these cross-modal layers."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """How long, how fast, in which batches; `"auto"` leaves a value to the service."""
    device: Annotated[Line, Field(min_length=1, max_length=32)] = "auto_performance"
    """A strategy (`auto_performance`, `stable_training`, `memory_efficient`, `auto_inference`) or
    `cuda`, `mps`, `cpu`."""
    name: Name | None = None
    """What you call the job."""
    metadata: Annotated[
        dict[MetadataKey, MetadataValue], Field(default_factory=dict, max_length=32)
    ]
    """Your own labels; lists can be filtered by them."""
    priority: Annotated[int, Field(strict=True, ge=-100, le=100)] = 0
    """Higher is claimed first, within your team's turn."""
    plan_hash: Annotated[Line, Field(max_length=128)] | None = None
    """The plan that you saw (`POST /jobs/plan`); another one now is refused."""
    auto_start: Annotated[bool, Field(strict=True)] = True
    """False: the job waits as `created` for `POST /jobs/{id}/start`."""

    def spec(self) -> dict[str, Any]:
        """Return what was sent, and nothing that was not, for `grit_core.job_spec`."""
        return self.model_dump(mode="json", exclude_unset=True)


class PlannedLayer(Answer):
    """One layer that adapts."""

    name: str
    modality: str
    block: int | None
    """Index of the transformer block; none for a layer outside of blocks."""
    rank: int
    alpha: float
    dropout: float
    in_features: int
    out_features: int
    parameters: int
    """Trainable parameters that the layer gets."""
    reason: str
    """Why it was picked."""
    natural_gradient: bool
    projection: bool
    fisher_approximation: str


class PlanRead(Answer):
    """Exactly what a job would do."""

    plan_hash: str
    model: str
    model_type: str
    inventory_hash: str
    layers: list[PlannedLayer]
    dropped: list[Any]
    """Layers that matched and were left out, with the reason."""
    warnings: list[str]
    trainable_parameters: int
    config: dict[str, Any]
    """The configuration, resolved."""
    training: dict[str, Any]
    """The training settings, with every `auto` replaced."""
    device: str
    device_reason: str
    estimate: dict[str, Any]
    """Steps and memory."""


class JobProgress(Answer):
    """How far a job is."""

    checked_rows: int | None = None
    """Rows found usable or not before the first step; this takes long for large datasets."""
    rows_to_check: int | None = None
    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    percent: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    elapsed_seconds: float | None = None
    remaining_seconds: float | None = None


class JobQueue(Answer):
    """Where a job waits."""

    name: str
    position: int | None
    """1 is next; none when the job does not wait, or more than 1,000 others come first."""
    reason: str | None
    """Why it waits longer than its position says, such as no live worker."""


class JobPlan(Answer):
    """A job's plan in short; `GET /jobs/{id}/layers` names the layers."""

    plan_hash: str
    layers: int
    trainable_parameters: int
    warnings: list[str]
    """What the plan warned of: layers that learn nothing, columns that are not read."""


class RetentionResult(Answer):
    """What training did to what the model could do before."""

    dataset: str
    """The job's `retention_dataset`."""
    loss_before: float | None
    """Of the base model: mean over the label tokens."""
    loss_after: float | None
    """Of the adapter that the job made."""


class CompactionResult(Answer):
    """What cutting the adapter's weakest directions changed."""

    ranks: dict[str, int]
    """By layer: the directions that were kept; a layer with none is not in the adapter."""
    parameters_before: int
    parameters_after: int
    predicted_kl: float | None
    """Divergence from the adapter before, as predicted: nats for a label token."""
    measured_kl: float | None = None
    """The same, measured on the rows that the prediction was made from."""
    max_kl: float
    """The bound that was asked for; neither of the two is above it."""
    eval_loss_before: float | None = None
    """Measured on the evaluation rows; none when there are none."""
    eval_loss_after: float | None = None


class JobResult(Answer):
    """What a job made."""

    adapter: str | None = None
    final_loss: float | None = None
    trainable_parameters: int | None = None
    effective_rank: dict[str, float] | None = None
    """By modality: the mean over its layers when curvature was last observed."""
    retention: RetentionResult | None = None
    """None without a `retention_dataset`."""
    compaction: CompactionResult | None = None
    """None when nothing was to be cut: neither `training.compaction_max_kl` nor a compression."""


class CompressionRead(Answer):
    """What a compression was asked for."""

    max_kl: float
    num_rows: int


class JobError(Answer):
    """Why a job failed."""

    code: str
    category: str
    """`user` or `system`."""
    message: str
    hint: str | None = None
    retryable: bool = False


class JobRead(Answer):
    """A job as it stands."""

    id: str
    kind: JobKind
    """`training`, or `compression` of an adapter (`POST /adapters/{id}/compress`)."""
    status: JobStatus
    phase: str | None
    status_reason: str | None
    model: str
    dataset: str
    """What is trained on; in a compression, where curvature is measured."""
    eval_dataset: str | None
    retention_dataset: str | None
    source_adapter: str | None
    """The adapter that a compression cuts; none once that adapter is deleted."""
    compression: CompressionRead | None
    """None for a training."""
    preset: str | None
    config: dict[str, Any]
    training: dict[str, Any]
    device: str
    device_reason: str | None
    name: str | None
    metadata: dict[str, str]
    priority: int
    team: str
    attempt: int
    max_attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    progress: JobProgress | None
    queue: JobQueue
    plan: JobPlan
    result: JobResult | None
    error: JobError | None
    links: dict[str, str]


class JobPage(Answer):
    """Some jobs, newest first."""

    data: list[JobRead]
    next: str | None
    """Cursor of the next page; none: these were the last."""


class EventRead(Answer):
    """A numbered fact about a job."""

    sequence: int
    type: str
    attempt: int | None
    created_at: datetime
    payload: dict[str, Any]


class EventPage(Answer):
    """Some events, oldest first."""

    data: list[EventRead]
    next: int | None
    """`after` of the next page; none: there are no more yet."""


class MetricsRead(Answer):
    """Series of equal length, one entry a recorded step."""

    job: str
    steps: int
    """Number of recorded steps before downsampling."""
    series: dict[str, list[float | int | None]]
    """`step`, `train_loss`, ..., and `effective_rank.<modality>`, `fisher_energy.<modality>`; where
    observed, also `requested_budget.<modality>`, `effective_budget.<modality>` (directions of all
    its layers) and `predicted_kl.<modality>` (nats for a label token)."""


class LayerRead(Answer):
    """One adapted layer, and its curvature over time."""

    name: str
    modality: str
    block: int | None
    rank: int
    alpha: float
    parameters: int
    reason: str
    effective_rank: float | None
    """At the last observation."""
    fisher_energy: float | None
    active: int | None
    """Directions that moved at the last observation; the others were frozen by the budget."""
    predicted_kl: float | None
    """Of dropping those that did not move, at the last observation: nats for a label token."""
    compacted_rank: int | None
    """Directions that the job's adapter has; none when it was not compacted."""
    history: list[dict[str, Any]]
    """`step`, `effective_rank`, `fisher_energy` and `spectrum` (descending) of each observation;
    `active` and `predicted_kl` where they were observed."""


class LayersRead(Answer):
    """The layers of a job's plan."""

    job: str
    layers: list[LayerRead]


class CheckpointRead(Answer):
    """A point that the job can resume from."""

    step: int
    attempt: int
    size_bytes: int | None
    manifest_sha256: str | None
    current: bool
    """Whether the job would resume from this one."""
    created_at: datetime


class CheckpointList(Answer):
    """The stored checkpoints of a job."""

    job: str
    data: list[CheckpointRead]


class AttemptRead(Answer):
    """One execution of a job."""

    id: str
    number: int
    worker: str
    outcome: str
    """`running`, `succeeded`, `failed`, `lost`, `handed_back`, `paused` or `cancelled`."""
    failure: dict[str, Any] | None
    """Why it failed or was lost: `code`, `category`, `message`, `hint`, `retryable`."""
    resumed_from_step: int | None
    last_step: int | None
    started_at: datetime
    ended_at: datetime | None


class AttemptList(Answer):
    """The executions of a job, the first one first."""

    job: str
    data: list[AttemptRead]


class ManifestRead(Answer):
    """All that reproduces a job."""

    job: str
    kind: JobKind
    request: dict[str, Any]
    """The request, as it was sent."""
    config: dict[str, Any]
    training: dict[str, Any]
    plan: dict[str, Any]
    plan_hash: str
    model: dict[str, Any]
    dataset: dict[str, Any]
    eval_dataset: dict[str, Any] | None
    retention_dataset: dict[str, Any] | None
    source_adapter: dict[str, Any] | None
    """`id` and `sha256` of the adapter that a compression cuts; none for a training."""
    device: str
    seed: int | None
    versions: dict[str, Any]
    """Of this service and, once an attempt has told them, of its libraries."""
    attempts: list[AttemptRead]
    result: dict[str, Any] | None
