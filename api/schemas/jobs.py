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
    """Full dotted name of the layer in the model."""
    modality: str
    """`vision`, `text`, `cross_modal` or `fusion`."""
    block: int | None
    """Index of the transformer block; none for a layer outside of blocks."""
    rank: int
    """LoRA rank."""
    alpha: float
    """LoRA alpha; the update is scaled by alpha / rank."""
    dropout: float
    """Dropout on the adapter's input."""
    in_features: int
    """Size of the layer's input."""
    out_features: int
    """Size of the layer's output."""
    parameters: int
    """Trainable parameters that the layer gets."""
    reason: str
    """Why it was picked."""
    natural_gradient: bool
    """Whether its steps use curvature."""
    projection: bool
    """Whether its steps are projected into the budget of directions."""
    fisher_approximation: str
    """How much of each factor is used: `diagonal`, `block_diagonal` or `kfac`."""


class PlanRead(Answer):
    """Exactly what a job would do."""

    plan_hash: str
    """Send it as `plan_hash` to `POST /jobs` so that no other plan runs."""
    model: str
    """The base model."""
    model_type: str
    """Its `model_type`, as in `config.json`."""
    inventory_hash: str
    """Hash of the model's adaptable layers."""
    layers: list[PlannedLayer]
    """The layers that adapt."""
    dropped: list[Any]
    """Layers that matched and were left out, with the reason."""
    warnings: list[str]
    """What stops no job and should be known before one."""
    trainable_parameters: int
    """Parameters that are trained, over all layers."""
    config: dict[str, Any]
    """The configuration, resolved."""
    training: dict[str, Any]
    """The training settings, with every `auto` replaced."""
    device: str
    """The device that the job would run on."""
    device_reason: str
    """Why that device."""
    estimate: dict[str, Any]
    """Steps and memory."""


class JobProgress(Answer):
    """How far a job is."""

    checked_rows: int | None = None
    """Rows found usable or not before the first step; this takes long for large datasets."""
    rows_to_check: int | None = None
    """Number of rows to check before the first step."""
    step: int = 0
    """Optimizer steps done."""
    total_steps: int | None = None
    """Optimizer steps of the whole job; null: not known yet."""
    epoch: float | None = None
    """Passes over the training rows done, with the fraction."""
    percent: float | None = None
    """Share of the job that is done, from 0 to 100."""
    train_loss: float | None = None
    """Loss of the last recorded step."""
    eval_loss: float | None = None
    """Loss of the last evaluation."""
    learning_rate: float | None = None
    """Learning rate of the last recorded step."""
    tokens_per_second: float | None = None
    """Tokens trained on in a second, of late."""
    elapsed_seconds: float | None = None
    """Seconds since the attempt began."""
    remaining_seconds: float | None = None
    """Estimated seconds until the job ends."""


class JobQueue(Answer):
    """Where a job waits."""

    name: str
    """A device, or `auto:` and the devices that may claim the job, the best first."""
    position: int | None
    """1 is next, as the turns of the teams stand now; none when the job does not wait, or more than
    1,000 others come first."""
    reason: str | None
    """Why it waits longer than its position says, such as no live worker."""


class JobPlan(Answer):
    """A job's plan in short; `GET /jobs/{id}/layers` names the layers."""

    plan_hash: str
    """Hash of the plan, as `POST /jobs/plan` gives it."""
    layers: int
    """Number of layers that adapt."""
    trainable_parameters: int
    """Parameters that are trained, over all layers."""
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
    """Trained parameters before the cut."""
    parameters_after: int
    """Parameters that are left."""
    predicted_kl: float | None
    """Divergence from the adapter before, as predicted: nats for a label token."""
    measured_kl: float | None = None
    """The same, measured on the rows that the prediction was made from."""
    max_kl: float
    """The bound that was asked for; neither of the two is above it."""
    eval_loss_before: float | None = None
    """Measured on the evaluation rows; none when there are none."""
    eval_loss_after: float | None = None
    """The same, after the cut."""


class JobResult(Answer):
    """What a job made."""

    adapter: str | None = None
    """Id of the adapter that the job made."""
    final_loss: float | None = None
    """Training loss at the end."""
    trainable_parameters: int | None = None
    """Parameters that were trained, over all layers."""
    effective_rank: dict[str, float] | None = None
    """By modality: the mean over its layers when curvature was last observed."""
    retention: RetentionResult | None = None
    """None without a `retention_dataset`."""
    compaction: CompactionResult | None = None
    """None when nothing was to be cut: neither `training.compaction_max_kl` nor a compression."""


class CompressionRead(Answer):
    """What a compression was asked for."""

    max_kl: float
    """Bound on the predicted divergence, in nats for a label token."""
    num_rows: int
    """Most rows on which curvature is measured."""


class JobError(Answer):
    """Why a job failed."""

    code: str
    """Stable name of the reason."""
    category: str
    """`user` or `system`."""
    message: str
    """What went wrong, in words."""
    hint: str | None = None
    """What to do about it."""
    retryable: bool = False
    """Whether another attempt may succeed without a change."""


class JobRead(Answer):
    """A job as it stands."""

    id: str
    """Id of the job, `job_...`."""
    kind: JobKind
    """`training`, or `compression` of an adapter (`POST /adapters/{id}/compress`)."""
    status: JobStatus
    """Where it is in its lifecycle."""
    phase: str | None
    """What a running job does now: `preparing`, `loading`, `checking`, `training`, `compressing`,
    `saving` or `publishing`."""
    status_reason: str | None
    """Why it has this status, where that needs a reason."""
    model: str
    """The base model."""
    dataset: str
    """What is trained on; in a compression, where curvature is measured."""
    eval_dataset: str | None
    """The dataset that it is evaluated on; null: a share of `dataset`, or none."""
    retention_dataset: str | None
    """Rows of what the model could do before; null: not measured."""
    source_adapter: str | None
    """The adapter that a compression cuts; none once that adapter is deleted."""
    compression: CompressionRead | None
    """None for a training."""
    preset: str | None
    """The named configuration that it was created with."""
    config: dict[str, Any]
    """Which layers adapt, and how, resolved."""
    training: dict[str, Any]
    """The training settings, with every `auto` replaced."""
    device: str
    """As bound by the claim; before it, the strategy that was asked for."""
    device_reason: str | None
    """Why that device."""
    name: str | None
    """What its team calls it; null: it has no name."""
    metadata: dict[str, str]
    """Its labels."""
    priority: int
    """Higher is claimed first, within the team's turn."""
    team: str
    """The team that it belongs to."""
    attempt: int
    """Number of the last attempt; 0: none has begun."""
    max_attempts: int
    """Attempts that may fail before the job does."""
    created_at: datetime
    """When it was created."""
    started_at: datetime | None
    """When its first attempt began; null: it has not."""
    finished_at: datetime | None
    """When it ended; null: it has not."""
    progress: JobProgress | None
    """How far it is; null: it has not begun."""
    queue: JobQueue
    """Where it waits."""
    plan: JobPlan
    """Its plan in short."""
    result: JobResult | None
    """What it made; null: it has not succeeded."""
    error: JobError | None
    """Why it failed; null: it has not."""
    links: dict[str, str]
    """Paths of the job and of what belongs to it."""


class JobPage(Answer):
    """Some jobs, newest first."""

    data: list[JobRead]
    """The jobs of this page."""
    next: str | None
    """Cursor of the next page; none: these were the last."""


class EventRead(Answer):
    """A numbered fact about a job."""

    sequence: int
    """Number of the event within the job, from 1."""
    type: str
    """What happened, such as `claimed`, `metrics` or `succeeded`."""
    attempt: int | None
    """Number of the attempt that it belongs to; null: it belongs to none."""
    created_at: datetime
    """When it happened."""
    payload: dict[str, Any]
    """What is known of it; its fields depend on `type`."""


class EventPage(Answer):
    """Some events, oldest first."""

    data: list[EventRead]
    """The events of this page."""
    next: int | None
    """`after` of the next page; none: there are no more yet."""


class MetricsRead(Answer):
    """Series of equal length, one entry a recorded step."""

    job: str
    """Id of the job."""
    steps: int
    """Number of recorded steps before downsampling."""
    series: dict[str, list[float | int | None]]
    """`step`, `train_loss`, ..., and `effective_rank.<modality>`, `fisher_energy.<modality>`; where
    observed, also `requested_budget.<modality>`, `effective_budget.<modality>` (directions of all
    its layers) and `predicted_kl.<modality>` (nats for a label token)."""


class LayerRead(Answer):
    """One adapted layer, and its curvature over time."""

    name: str
    """Full dotted name of the layer in the model."""
    modality: str
    """`vision`, `text`, `cross_modal` or `fusion`."""
    block: int | None
    """Index of the transformer block; null for a layer outside of blocks."""
    rank: int
    """LoRA rank."""
    alpha: float
    """LoRA alpha; the update is scaled by alpha / rank."""
    parameters: int
    """Trainable parameters of the layer."""
    reason: str
    """Why it was picked."""
    effective_rank: float | None
    """At the last observation."""
    fisher_energy: float | None
    """Sum of the spectrum at the last observation."""
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
    """Id of the job."""
    layers: list[LayerRead]
    """The layers, in the order of the plan."""


class CheckpointRead(Answer):
    """A point that the job can resume from."""

    step: int
    """Optimizer step at which it was saved."""
    attempt: int
    """Number of the attempt that saved it."""
    size_bytes: int | None
    """Bytes of its stored files."""
    manifest_sha256: str | None
    """SHA-256 of the list of its files."""
    current: bool
    """Whether the job would resume from this one."""
    created_at: datetime
    """When it was stored."""


class CheckpointList(Answer):
    """The stored checkpoints of a job."""

    job: str
    """Id of the job."""
    data: list[CheckpointRead]
    """The checkpoints."""


class AttemptRead(Answer):
    """One execution of a job."""

    id: str
    """Id of the attempt."""
    number: int
    """Number of the attempt, from 1."""
    worker: str
    """Name of the worker that ran it."""
    outcome: str
    """`running`, `succeeded`, `failed`, `lost`, `handed_back`, `paused` or `cancelled`."""
    failure: dict[str, Any] | None
    """Why it failed or was lost: `code`, `category`, `message`, `hint`, `retryable`."""
    resumed_from_step: int | None
    """Step of the checkpoint that it went on from; null: it began at the start."""
    last_step: int | None
    """Last optimizer step that it reported."""
    started_at: datetime
    """When it began."""
    ended_at: datetime | None
    """When it ended; null: it runs."""


class AttemptList(Answer):
    """The executions of a job, the first one first."""

    job: str
    """Id of the job."""
    data: list[AttemptRead]
    """The attempts."""


class ManifestRead(Answer):
    """All that reproduces a job."""

    job: str
    """Id of the job."""
    kind: JobKind
    """`training` or `compression`."""
    request: dict[str, Any]
    """The request, as it was sent."""
    config: dict[str, Any]
    """Which layers adapt, and how, resolved."""
    training: dict[str, Any]
    """The training settings, with every `auto` replaced."""
    plan: dict[str, Any]
    """The whole plan, as `POST /jobs/plan` gives it."""
    plan_hash: str
    """Hash of the plan."""
    model: dict[str, Any]
    """The base model: id, source and hash of its layers."""
    dataset: dict[str, Any]
    """`id` and `sha256` of the training rows."""
    eval_dataset: dict[str, Any] | None
    """`id` and `sha256` of the evaluation rows; null: no dataset of their own."""
    retention_dataset: dict[str, Any] | None
    """`id` and `sha256` of the retention rows; null: not measured."""
    source_adapter: dict[str, Any] | None
    """`id` and `sha256` of the adapter that a compression cuts; none for a training."""
    device: str
    """The device that the job was planned for."""
    seed: int | None
    """Seed of the training."""
    versions: dict[str, Any]
    """Of this service and, once an attempt has told them, of its libraries."""
    attempts: list[AttemptRead]
    """The executions of the job, the first one first."""
    result: dict[str, Any] | None
    """What the job made; null: it has not succeeded."""
