"""Jobs, events and checkpoints as OpenAI's clients read them."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from api.openai.models import seconds
from api.openai.schemas.fine_tuning import (
    BASE_LEARNING_RATE,
    CheckpointMetrics,
    FineTuningCheckpoint,
    FineTuningError,
    FineTuningEvent,
    FineTuningFacts,
    FineTuningJob,
    ResolvedHyperparameters,
    ResolvedMethod,
    ResolvedSupervised,
)
from api.presentation import finite
from api.schemas.jobs import JobRead
from store.events import PROGRESS
from store.lifecycle import STATUS_CHANGED
from store.models import Checkpoint, Event, JobStatus, Metric

STATUSES: Final[Mapping[JobStatus, Any]] = {
    JobStatus.CREATED: "paused",
    JobStatus.QUEUED: "queued",
    JobStatus.RUNNING: "running",
    JobStatus.PAUSING: "running",
    JobStatus.PAUSED: "paused",
    JobStatus.CANCELLING: "running",
    JobStatus.CANCELLED: "cancelled",
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
}
"""OpenAI's status for each of ours; what has been asked for and not yet happened still runs."""


def present_tuning(job: JobRead, *, num_tokens: int | None) -> FineTuningJob:
    """Return a job; `num_tokens` is what it has trained on so far."""
    succeeded = job.status == JobStatus.SUCCEEDED
    used = _hyperparameters(job.training)
    return FineTuningJob(
        id=job.id,
        model=job.model,
        created_at=seconds(job.created_at),
        finished_at=None if job.finished_at is None else seconds(job.finished_at),
        estimated_finish=_estimated_finish(job),
        fine_tuned_model=job.result.adapter if succeeded and job.result is not None else None,
        organization_id=job.team,
        status=STATUSES[job.status],
        training_file=job.dataset,
        validation_file=job.eval_dataset,
        result_files=[],
        hyperparameters=used,
        method=ResolvedMethod(supervised=ResolvedSupervised(hyperparameters=used)),
        trained_tokens=num_tokens if succeeded else None,
        seed=job.training["seed"],
        metadata=job.metadata,
        integrations=[],
        error=_error(job),
        grit=FineTuningFacts(
            status=job.status,
            phase=job.phase,
            name=job.name,
            preset=job.preset,
            device=job.device,
            progress=job.progress,
        ),
    )


def _hyperparameters(training: Mapping[str, Any]) -> ResolvedHyperparameters:
    epochs = float(training["epochs"])
    return ResolvedHyperparameters(
        n_epochs=int(epochs) if epochs.is_integer() else epochs,
        batch_size=training["batch_size"],
        # Rounded, so that a multiple that was asked for comes back as it was.
        learning_rate_multiplier=round(training["learning_rate"] / BASE_LEARNING_RATE, 9),
    )


def _estimated_finish(job: JobRead) -> int | None:
    left = None if job.progress is None else job.progress.remaining_seconds
    if job.status != JobStatus.RUNNING or left is None:
        return None
    return seconds(datetime.now(UTC) + timedelta(seconds=left))


def _error(job: JobRead) -> FineTuningError | None:
    if job.status != JobStatus.FAILED or job.error is None:
        return None
    words = [job.error.message, *([job.error.hint] if job.error.hint else [])]
    return FineTuningError(code=job.error.code, message=" ".join(words))


# --- events


def event_id(event: Event) -> str:
    """Return an event's id: its job's, and its number."""
    return f"{event.job_id}.{event.sequence}"


def sequence_of(event_id: str, *, job_id: str) -> int | None:
    """Return the number behind an event's id; none if it is no event of this job."""
    job, _, number = event_id.rpartition(".")
    known = job == job_id and number.isascii() and number.isdecimal() and len(number) <= 10
    return int(number) if known else None


def present_event(event: Event) -> FineTuningEvent:
    """Return a fact about a job."""
    return FineTuningEvent(
        id=event_id(event),
        created_at=seconds(event.created_at),
        level=_level(event),
        message=_message(event),
        type="metrics" if event.type == PROGRESS else "message",
        data={"type": event.type, **event.payload},
    )


def _level(event: Event) -> Any:
    failed = event.type == STATUS_CHANGED and event.payload.get("to") == JobStatus.FAILED
    if failed or event.type == "training_failed":
        return "error"
    return "warn" if event.type == "warned" else "info"


def _message(event: Event) -> str:
    payload = event.payload
    if event.type == STATUS_CHANGED:
        reason = payload.get("reason")
        return f"The job is {payload.get('to')}{f': {reason}' if reason else ''}."
    if event.type == PROGRESS:
        loss = payload.get("train_loss")
        told = "" if loss is None else f", training loss={loss:.4g}"
        return f"Step {payload.get('step')}/{payload.get('total_steps')}{told}"
    words = payload.get("message")
    return str(words) if words else event.type.replace("_", " ").capitalize() + "."


# --- checkpoints


def checkpoint_id(checkpoint: Checkpoint) -> str:
    """Return a checkpoint's id: its job's, and its step."""
    return f"{checkpoint.job_id}.step-{checkpoint.step}"


def present_checkpoint(checkpoint: Checkpoint, metric: Metric | None) -> FineTuningCheckpoint:
    """Return a checkpoint with what was measured at its step, if anything was."""
    return FineTuningCheckpoint(
        id=checkpoint_id(checkpoint),
        created_at=seconds(checkpoint.created_at),
        fine_tuning_job_id=checkpoint.job_id,
        step_number=checkpoint.step,
        metrics=CheckpointMetrics(
            step=checkpoint.step,
            train_loss=None if metric is None else finite(metric.train_loss),
            full_valid_loss=None if metric is None else finite(metric.eval_loss),
        ),
    )
