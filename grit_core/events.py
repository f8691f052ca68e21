"""What training tells its caller: frozen facts, each with a wire name and plain JSON values."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsChecked:
    """Rows are being checked before the first step; sent while that takes long, and at its end."""

    type: ClassVar[str] = "rows_checked"
    done: int
    total: int
    """Rows to train on, to evaluate on and of retention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStarted:
    """The model is loaded, the layers are adapted, the first step is next."""

    type: ClassVar[str] = "training_started"
    total_steps: int
    """Optimizer steps of the whole job."""
    start_step: int
    """Steps already done by an earlier attempt; 0 when nothing was resumed."""
    device: str
    precision: str
    num_rows: int
    """Rows that are trained on, the evaluation split taken out."""
    num_eval_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCompleted:
    """One optimizer step is done."""

    type: ClassVar[str] = "step_completed"
    step: int
    """1 for the first step."""
    total_steps: int
    epoch: float
    """Passes over the training rows so far, as a fraction."""
    train_loss: float
    """Mean over the label tokens of this step's batch."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    """Tokens of this step, padding left out."""
    tokens_per_second: float
    elapsed_seconds: float
    """Since this attempt's first step began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """The evaluation split was run."""

    type: ClassVar[str] = "evaluated"
    step: int
    eval_loss: float
    """Mean over the label tokens of the split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionEvaluated:
    """The retention rows were run: what the model could do before this job."""

    type: ClassVar[str] = "retention_evaluated"
    step: int
    when: str
    """`before` the first step (the base model) or `after` the last (the adapter as exported)."""
    loss: float
    """Mean over the label tokens of the retention rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """A checkpoint is complete on disk."""

    type: ClassVar[str] = "checkpoint_saved"
    step: int
    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvatureObserved:
    """The rank-space factors were refreshed."""

    type: ClassVar[str] = "curvature_observed"
    step: int
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By layer name: `effective_rank`, `fisher_energy`, `spectrum` (descending), `active` (number
    of directions that move), `predicted_kl` (of dropping the others, nats for a label token)."""
    modalities: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By modality: `effective_rank` (mean over its layers), `fisher_energy` (sum), and with a
    projection budget `requested_budget`, `effective_budget`, `num_directions`, `predicted_kl`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reprojected:
    """Rank space was written in the canonical Fisher gauge and the budget given out anew."""

    type: ClassVar[str] = "reprojected"
    step: int
    modalities: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By modality with projection: `requested_budget`, `effective_budget`, `num_directions`, and
    `predicted_kl` of dropping the frozen directions, in nats for a label token."""
    refused: list[str] = field(default_factory=list)
    """Layers whose gauge was too badly conditioned; they keep their coordinates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSkipped:
    """An optimizer step, or the observation that belonged to it, was left out."""

    type: ClassVar[str] = "step_skipped"
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Warned:
    """Something a user should know that does not stop the job."""

    type: ClassVar[str] = "warned"
    code: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Compacted:
    """The adapter's weakest directions were cut; what is exported is what is left."""

    type: ClassVar[str] = "compacted"
    step: int
    """Optimizer steps that the adapter has had; 0 when an adapter was compressed by itself."""
    ranks: dict[str, int]
    """What is left of each adapted layer; a layer of rank 0 is not exported."""
    parameters_before: int
    parameters_after: int
    predicted_kl: float
    """Of the cut, in nats for a label token of the calibration rows, to second order."""
    max_kl: float
    """The limit that the job set; neither prediction nor measurement is above it."""
    eval_loss_before: float | None
    """Mean over the label tokens of the evaluation rows; `None` when there are none."""
    eval_loss_after: float | None
    measured_kl: float | None = None
    """KL(whole adapter || cut adapter) over the calibration rows' label tokens, exactly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSaved:
    """The adapter folder is written and agrees with the trained model when plain PEFT loads it."""

    type: ClassVar[str] = "adapter_saved"
    folder: str
    sha256: str
    """Of `adapter_model.safetensors`."""
    trainable_parameters: int
    max_logit_difference: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStopped:
    """Asked to stop, training saved a checkpoint and ended."""

    type: ClassVar[str] = "training_stopped"
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFinished:
    """All steps are done and the adapter is saved."""

    type: ClassVar[str] = "training_finished"
    step: int
    train_loss: float
    eval_loss: float | None
    retention_loss_before: float | None = None
    """Of the base model; `None` when the job names no retention rows."""
    retention_loss_after: float | None = None
    """Of the exported adapter."""
    compaction: dict[str, Any] | None = None
    """The fields of `Compacted` without its step; `None` when nothing was to be cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFailed:
    """Training ended badly."""

    type: ClassVar[str] = "training_failed"
    code: str
    category: str
    """`user` when the request has to change, `system` when the deployment has to."""
    message: str
    hint: str
    retryable: bool
    details: dict[str, Any] = field(default_factory=dict)
    """What is too long for the message, such as every row that cannot be used."""


TrainingEvent = (
    RowsChecked
    | TrainingStarted
    | StepCompleted
    | Evaluated
    | RetentionEvaluated
    | CheckpointSaved
    | CurvatureObserved
    | Reprojected
    | StepSkipped
    | Warned
    | Compacted
    | AdapterSaved
    | TrainingStopped
    | TrainingFinished
    | TrainingFailed
)

_EVENT_TYPES: dict[str, type[TrainingEvent]] = {
    event_type.type: event_type for event_type in TrainingEvent.__args__
}


def event_to_json(event: TrainingEvent) -> dict[str, Any]:
    """The event as JSON values, its wire name under `type`."""
    return {"type": event.type, **dataclasses.asdict(event)}


def event_from_json(data: Mapping[str, Any]) -> TrainingEvent:
    """Build the event that `event_to_json` wrote.

    Raises:
        ValueError: When `type` names no event.
    """
    values = dict(data)
    name = values.pop("type", None)
    if name not in _EVENT_TYPES:
        raise ValueError(f"{name!r} is no event; known are {', '.join(sorted(_EVENT_TYPES))}.")
    return _EVENT_TYPES[name](**values)
