"""`/v1/fine_tuning/jobs` on the wire."""

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationInfo, WithJsonSchema, WrapValidator, field_validator
from pydantic import model_validator as whole

from api.openai.schemas.unsupported import Unsupported, refuse
from api.schemas.config import ModelGRITConfig, TrainingConfig
from api.schemas.fields import Answer, Body, Id, Line, ModelName
from api.schemas.jobs import JobProgress, LayerNames, MetadataKey, MetadataValue
from grit_core.config.training import TrainingConfig as CoreTrainingConfig
from store.models import JobStatus

BASE_LEARNING_RATE: Final = CoreTrainingConfig().learning_rate
"""What a `learning_rate_multiplier` of 1 stands for."""

UNSUPPORTED: Final = {
    "integrations": Unsupported("metrics stay here (GET /jobs/{id}/metrics)", ([],)),
}
UNSUPPORTED_METHODS: Final = {
    "dpo": Unsupported("adapters are trained on answers (supervised)"),
    "reinforcement": Unsupported("adapters are trained on answers (supervised)"),
}


def _auto_is_none(value: Any, handler: Callable[[Any], Any]) -> Any:
    return None if value == "auto" else handler(value)


def _or_auto(kind: str, **bounds: float) -> WithJsonSchema:
    number = {"type": kind, **bounds}
    auto, null = {"const": "auto", "type": "string"}, {"type": "null"}
    return WithJsonSchema({"anyOf": [number, auto, null]})


class FineTuningHyperparameters(Body):
    """How long, how fast, in which batches; `"auto"` leaves a value to the service."""

    n_epochs: Annotated[
        Annotated[int, Field(strict=True, ge=1, le=10_000)] | None,
        WrapValidator(_auto_is_none),
        _or_auto("integer", minimum=1, maximum=10_000),
    ] = None
    """`training.epochs`."""
    batch_size: Annotated[
        Annotated[int, Field(strict=True, ge=1, le=4096)] | None,
        WrapValidator(_auto_is_none),
        _or_auto("integer", minimum=1, maximum=4096),
    ] = None
    """`training.batch_size`: rows in one forward pass."""
    learning_rate_multiplier: Annotated[
        Annotated[float, Field(strict=True, gt=0, le=10_000)] | None,
        WrapValidator(_auto_is_none),
        _or_auto("number", exclusiveMinimum=0, maximum=10_000),
    ] = None
    """`training.learning_rate`, as a multiple of its default of 2e-4."""


class SupervisedMethod(Body):
    """Training on the assistant's answers."""

    hyperparameters: FineTuningHyperparameters | None = None


class FineTuningMethod(Body):
    """How the job trains."""

    type: Literal["supervised"]
    supervised: SupervisedMethod | None = None
    dpo: Any = None
    reinforcement: Any = None

    @field_validator(*UNSUPPORTED_METHODS)
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse(UNSUPPORTED_METHODS, info.field_name, value)


class GritOptions(Body):
    """Fields of `POST /jobs` that OpenAI's shape has no place for: `extra_body={"grit": {...}}`."""

    preset: Annotated[Line, Field(min_length=1, max_length=100)] | None = None
    """Without a preset and a `config`: the family's balanced preset, or its fast one where the
    model is too small for that."""
    config: ModelGRITConfig | None = None
    training: TrainingConfig | None = None
    eval_fraction: Annotated[float, Field(strict=True, ge=0, le=0.5)] | None = None
    retention_dataset: Id | None = None
    vision_layers: LayerNames | None = None
    text_layers: LayerNames | None = None
    cross_modal_layers: LayerNames | None = None
    device: Annotated[Line, Field(min_length=1, max_length=32)] | None = None
    priority: Annotated[int, Field(strict=True, ge=-100, le=100)] | None = None
    plan_hash: Annotated[Line, Field(max_length=128)] | None = None
    auto_start: Annotated[bool, Field(strict=True)] | None = None
    """False: the job is `paused` until it is resumed."""


class FineTuningJobCreate(Body):
    """A request to fine-tune."""

    model: ModelName
    """A base model."""
    training_file: Id
    """A file of `POST /v1/files`."""
    validation_file: Id | None = None
    """Another one, to evaluate on. Without it, a share of the training file is held out."""
    hyperparameters: FineTuningHyperparameters | None = None
    """The older place of `method.supervised.hyperparameters`."""
    method: FineTuningMethod | None = None
    suffix: Annotated[Line, Field(min_length=1, max_length=64)] | None = None
    """What the job and its adapter are called."""
    seed: Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=32)] | None = None
    integrations: Any = None
    grit: GritOptions | None = None

    @field_validator(*UNSUPPORTED)
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse(UNSUPPORTED, info.field_name, value)

    @whole(mode="after")
    def _one_place(self) -> Self:
        """Check that the hyperparameters stand in one place.

        Raises:
            ValueError: If they do not.
        """
        if self.hyperparameters is not None and self._supervised is not None:
            raise ValueError(
                "hyperparameters stand both at the top and in `method.supervised`; send one of them"
            )
        return self

    @property
    def _supervised(self) -> FineTuningHyperparameters | None:
        supervised = None if self.method is None else self.method.supervised
        return None if supervised is None else supervised.hyperparameters

    @property
    def wanted(self) -> FineTuningHyperparameters:
        """The hyperparameters, wherever they stand."""
        return self._supervised or self.hyperparameters or FineTuningHyperparameters()

    @property
    def place(self) -> str:
        """Pointer to the hyperparameters."""
        old = self.hyperparameters is not None
        return "/hyperparameters" if old else "/method/supervised/hyperparameters"


class ResolvedHyperparameters(Answer):
    """With which the job trains."""

    n_epochs: int | float
    """A fraction where `grit.training.epochs` asked for one."""
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float


class ResolvedSupervised(Answer):
    """The method's settings."""

    hyperparameters: ResolvedHyperparameters


class ResolvedMethod(Answer):
    """How the job trains."""

    type: Literal["supervised"] = "supervised"
    supervised: ResolvedSupervised


class FineTuningError(Answer):
    """Why a job failed."""

    code: str
    message: str
    param: None = None


class FineTuningFacts(Answer):
    """What we know of a job and OpenAI's shape has no place for; `GET /jobs/{id}` says all."""

    status: JobStatus
    """Ours, which is finer."""
    phase: str | None
    name: str | None
    preset: str | None
    device: str
    progress: JobProgress | None


class FineTuningJob(Answer):
    """A fine-tuning job as it stands."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    model: str
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    """While it runs, once it is known."""
    fine_tuned_model: str | None
    """The adapter that it made, once it has succeeded."""
    organization_id: str
    """The team."""
    status: Literal[
        "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
    ]
    """`validating_files` is never seen: files are checked when they are uploaded."""
    training_file: str
    validation_file: str | None
    result_files: list[str]
    """Always empty: metrics are in the events, and in `GET /jobs/{id}/metrics`."""
    hyperparameters: ResolvedHyperparameters
    method: ResolvedMethod
    trained_tokens: int | None
    """Tokens of all steps, images included, once it has succeeded."""
    seed: int
    metadata: dict[str, str]
    integrations: list[Any]
    error: FineTuningError | None
    grit: FineTuningFacts


class FineTuningJobList(Answer):
    """Some jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(Answer):
    """A fact about a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]
    """What `GET /jobs/{id}/events` tells of it."""


class FineTuningEventList(Answer):
    """Some events, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class CheckpointMetrics(Answer):
    """What was measured at a checkpoint's step."""

    step: int
    train_loss: float | None
    full_valid_loss: float | None


class FineTuningCheckpoint(Answer):
    """A point that the job can resume from."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: None = None
    """Always null: a checkpoint is resumed from, and cannot be asked."""
    step_number: int
    metrics: CheckpointMetrics


class FineTuningCheckpointList(Answer):
    """Some checkpoints, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool
