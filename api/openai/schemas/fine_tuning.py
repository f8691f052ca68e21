"""`/v1/fine_tuning/jobs` on the wire."""

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationInfo, WithJsonSchema, WrapValidator, field_validator
from pydantic import model_validator as whole

from api.openai.schemas.client_body import ClientBody
from api.openai.schemas.unsupported import Unsupported, refuse
from api.schemas.config import ModelGRITConfig, TrainingConfig
from api.schemas.fields import Answer, Id, Line, ModelName
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


class FineTuningHyperparameters(ClientBody):
    """How long, how fast, in which batches; `"auto"` leaves a value to the service."""

    n_epochs: Annotated[
        Annotated[int, Field(strict=True, ge=1, le=10_000)] | None,
        WrapValidator(_auto_is_none),
        _or_auto("integer", minimum=1, maximum=10_000),
    ] = None
    """Passes over the training file, as `training.epochs`."""
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


class SupervisedMethod(ClientBody):
    """Training on the assistant's answers."""

    hyperparameters: FineTuningHyperparameters | None = None
    """How long, how fast, in which batches."""


class FineTuningMethod(ClientBody):
    """How the job trains."""

    type: Literal["supervised"]
    """Only `supervised`."""
    supervised: SupervisedMethod | None = None
    """Settings of the method."""
    dpo: Any = None
    """Not supported: adapters are trained on answers."""
    reinforcement: Any = None
    """Not supported: adapters are trained on answers."""

    @field_validator(*UNSUPPORTED_METHODS)
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse(UNSUPPORTED_METHODS, info.field_name, value)


class GritOptions(ClientBody):
    """Fields of `POST /jobs` that OpenAI's shape has no place for: `extra_body={"grit": {...}}`."""

    preset: Annotated[Line, Field(min_length=1, max_length=100)] | None = None
    """Without a preset and a `config`: the family's balanced preset, or its fast one where the
    model is too small for that."""
    config: ModelGRITConfig | None = None
    """Which layers adapt, and how, as in `POST /jobs`."""
    training: TrainingConfig | None = None
    """Training settings, as in `POST /jobs`."""
    eval_fraction: Annotated[float, Field(strict=True, ge=0, le=0.5)] | None = None
    """Share of the training file that is held out for evaluation."""
    retention_dataset: Id | None = None
    """Rows of what the model can do already; their loss is measured before and after."""
    vision_layers: LayerNames | None = None
    """Exactly these vision layers (names or patterns)."""
    text_layers: LayerNames | None = None
    """Exactly these text layers."""
    cross_modal_layers: LayerNames | None = None
    """Exactly these cross-modal layers."""
    device: Annotated[Line, Field(min_length=1, max_length=32)] | None = None
    """A strategy or a device, as in `POST /jobs`."""
    priority: Annotated[int, Field(strict=True, ge=-100, le=100)] | None = None
    """Higher is claimed first, within your team's turn."""
    plan_hash: Annotated[Line, Field(max_length=128)] | None = None
    """The plan that you saw (`POST /jobs/plan`); another one is refused."""
    auto_start: Annotated[bool, Field(strict=True)] | None = None
    """False: the job is `paused` until it is resumed."""


class FineTuningJobCreate(ClientBody):
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
    """How the job trains; only `supervised`."""
    suffix: Annotated[Line, Field(min_length=1, max_length=64)] | None = None
    """What the job and its adapter are called."""
    seed: Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)] | None = None
    """Seed of the training; 0 when it is left out."""
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=32)] | None = None
    """Your own labels."""
    integrations: Any = None
    """Accepted as null or `[]`: metrics stay here (`GET /jobs/{id}/metrics`)."""
    grit: GritOptions | None = None
    """What OpenAI's shape has no place for."""

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
    """Rows in one forward pass."""
    learning_rate_multiplier: float
    """The learning rate, as a multiple of 2e-4."""


class ResolvedSupervised(Answer):
    """The method's settings."""

    hyperparameters: ResolvedHyperparameters
    """The values with which the job trains."""


class ResolvedMethod(Answer):
    """How the job trains."""

    type: Literal["supervised"] = "supervised"
    """Always `supervised`."""
    supervised: ResolvedSupervised
    """Settings of this method."""


class FineTuningError(Answer):
    """Why a job failed."""

    code: str
    """Stable name of the reason."""
    message: str
    """What went wrong, in words."""
    param: None = None
    """Always null."""


class FineTuningFacts(Answer):
    """What we know of a job and OpenAI's shape has no place for; `GET /jobs/{id}` says all."""

    status: JobStatus
    """Ours, which is finer."""
    phase: str | None
    """What a running job does now."""
    name: str | None
    """What its team calls it."""
    preset: str | None
    """The named configuration that it was created with."""
    device: str
    """The device that it runs on."""
    progress: JobProgress | None
    """How far it is; null: it has not begun."""


class FineTuningJob(Answer):
    """A fine-tuning job as it stands."""

    id: str
    """Id of the job, as in `GET /jobs/{id}`."""
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    """Always `fine_tuning.job`."""
    model: str
    """The base model."""
    created_at: int
    """Seconds since 1970."""
    finished_at: int | None
    """Seconds since 1970; null: it has not ended."""
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
    """The file that is trained on."""
    validation_file: str | None
    """The file that it is evaluated on; null: a share of the training file."""
    result_files: list[str]
    """Always empty: metrics are in the events, and in `GET /jobs/{id}/metrics`."""
    hyperparameters: ResolvedHyperparameters
    """The values with which the job trains."""
    method: ResolvedMethod
    """The same, in the newer place."""
    trained_tokens: int | None
    """Tokens of all steps, images included, once it has succeeded."""
    seed: int
    """Seed of the training."""
    metadata: dict[str, str]
    """Its labels."""
    integrations: list[Any]
    """Always empty."""
    error: FineTuningError | None
    """Why it failed; null: it has not."""
    grit: FineTuningFacts
    """What OpenAI's shape has no place for."""


class FineTuningJobList(Answer):
    """Some jobs, newest first."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[FineTuningJob]
    """The jobs of this page."""
    has_more: bool
    """Whether there is another page."""


class FineTuningEvent(Answer):
    """A fact about a job."""

    id: str
    """Id of the event."""
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    """Always `fine_tuning.job.event`."""
    created_at: int
    """Seconds since 1970."""
    level: Literal["info", "warn", "error"]
    """How grave it is."""
    message: str
    """What happened, in words."""
    type: Literal["message", "metrics"]
    """`metrics` of a recorded step, `message` of everything else."""
    data: dict[str, Any]
    """What `GET /jobs/{id}/events` tells of it."""


class FineTuningEventList(Answer):
    """Some events, newest first."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[FineTuningEvent]
    """The events of this page."""
    has_more: bool
    """Whether there is another page."""


class CheckpointMetrics(Answer):
    """What was measured at a checkpoint's step."""

    step: int
    """Optimizer step at which it was saved."""
    train_loss: float | None
    """Loss of that step."""
    full_valid_loss: float | None
    """Loss of the last evaluation until then; null: there was none."""


class FineTuningCheckpoint(Answer):
    """A point that the job can resume from."""

    id: str
    """Id of the checkpoint."""
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    """Always `fine_tuning.job.checkpoint`."""
    created_at: int
    """Seconds since 1970."""
    fine_tuning_job_id: str
    """The job that it belongs to."""
    fine_tuned_model_checkpoint: None = None
    """Always null: a checkpoint is resumed from, and cannot be asked."""
    step_number: int
    """Optimizer step at which it was saved."""
    metrics: CheckpointMetrics
    """What was measured at that step."""


class FineTuningCheckpointList(Answer):
    """Some checkpoints, newest first."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[FineTuningCheckpoint]
    """The checkpoints of this page."""
    first_id: str | None
    """Id of the page's first checkpoint; null on an empty page."""
    last_id: str | None
    """`after` of the next page."""
    has_more: bool
    """Whether there is another page."""
