"""Rows as answers: what a caller sees of what is stored."""

import math
from typing import Any, Final

from api.links import link
from api.schemas.adapters import AdapterRead
from api.schemas.datasets import DatasetRead
from api.schemas.jobs import (
    AttemptRead,
    CompressionRead,
    EventRead,
    JobError,
    JobPlan,
    JobProgress,
    JobQueue,
    JobRead,
    JobResult,
)
from api.schemas.keys import KeyRead
from api.schemas.models import ModelRead
from store.job_rows import JobRow
from store.models import (
    Adapter,
    ApiKey,
    Attempt,
    BaseModelRow,
    Dataset,
    Event,
    Job,
    JobKind,
    JobStatus,
)

_PARTS: Final = ("attempts", "events", "metrics", "layers", "checkpoints")


def present_job(
    job: Job | JobRow, *, position: int | None = None, reason: str | None = None
) -> JobRead:
    """Return a job as it stands; `position` and `reason` say why it waits."""
    path = link(f"/jobs/{job.id}")
    num_layers, trainable_parameters = _size_of(job)
    links = {name: f"{path}/{name}" for name in _PARTS}
    return JobRead(
        id=job.id,
        kind=JobKind(job.kind),
        status=JobStatus(job.status),
        phase=job.phase,
        status_reason=job.status_reason,
        model=job.model,
        dataset=job.dataset_id,
        eval_dataset=job.eval_dataset_id,
        retention_dataset=job.retention_dataset_id,
        source_adapter=job.source_adapter_id,
        compression=_compression(job),
        preset=job.preset,
        config=job.config,
        training=job.training,
        device=job.device,
        device_reason=job.device_reason,
        name=job.name,
        metadata=job.user_metadata,
        priority=job.priority,
        team=job.team,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        progress=_progress(job.progress),
        queue=JobQueue(name=job.queue, position=position, reason=reason),
        plan=JobPlan(
            plan_hash=job.plan_hash,
            layers=num_layers,
            trainable_parameters=trainable_parameters,
            warnings=_warnings(job),
        ),
        result=_result(job.result),
        error=None if job.error is None else JobError.model_validate(_known(JobError, job.error)),
        links={"self": path, "manifest": f"{path}/manifest", **links},
    )


def _size_of(job: Job | JobRow) -> tuple[int, int]:
    """Return the layers of a job's plan and what is trained of them; 0 without a plan."""
    if isinstance(job, JobRow):
        return job.num_layers or 0, job.trainable_parameters or 0
    return len(job.plan.get("layers", ())), job.plan.get("trainable_parameters", 0)


def _warnings(job: Job | JobRow) -> list[str]:
    found = job.warnings if isinstance(job, JobRow) else job.plan.get("warnings")
    return list(found or ())


def _compression(job: Job | JobRow) -> CompressionRead | None:
    if job.kind != JobKind.COMPRESSION:
        return None
    request = job.compression if isinstance(job, JobRow) else job.request
    return CompressionRead.model_validate(_known(CompressionRead, request or {}))


def _progress(stored: dict[str, Any] | None) -> JobProgress | None:
    if stored is None:
        return None
    return JobProgress.model_validate({
        key: finite(value) for key, value in _known(JobProgress, stored).items()
    })


def _result(stored: dict[str, Any] | None) -> JobResult | None:
    if stored is None:
        return None
    known = _known(JobResult, stored)
    known.setdefault("adapter", stored.get("adapter_id"))
    known.setdefault("final_loss", stored.get("train_loss"))
    return JobResult.model_validate(known)


def _known(kind: Any, stored: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stored.items() if key in kind.model_fields}


def finite(value: Any) -> Any:
    """Return a value that JSON can hold: a number that is not finite becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def present_event(event: Event) -> EventRead:
    """Return a fact about a job."""
    return EventRead(
        sequence=event.sequence,
        type=event.type,
        attempt=event.attempt,
        created_at=event.created_at,
        payload=event.payload,
    )


def present_attempt(attempt: Attempt) -> AttemptRead:
    """Return an execution of a job."""
    return AttemptRead(
        id=attempt.id,
        number=attempt.number,
        worker=attempt.worker_id,
        outcome=attempt.outcome,
        failure=attempt.failure,
        resumed_from_step=attempt.resumed_from_step,
        last_step=attempt.last_step,
        started_at=attempt.started_at,
        ended_at=attempt.ended_at,
    )


def present_dataset(dataset: Dataset) -> DatasetRead:
    """Return a dataset."""
    path = link(f"/datasets/{dataset.id}")
    return DatasetRead.model_validate({
        **_columns(dataset, DatasetRead),
        "links": {"self": path, "report": f"{path}/report"},
    })


def present_adapter(adapter: Adapter) -> AdapterRead:
    """Return an adapter."""
    path = link(f"/adapters/{adapter.id}")
    links = {"self": path, "download": f"{path}/download"}
    if adapter.job_id is not None:
        links["job"] = link(f"/jobs/{adapter.job_id}")
    if adapter.parent_id is not None:
        links["parent"] = link(f"/adapters/{adapter.parent_id}")
    return AdapterRead.model_validate({
        **_columns(adapter, AdapterRead),
        "job": adapter.job_id,
        "parent": adapter.parent_id,
        "ranks": (adapter.details or {}).get("ranks"),
        "links": links,
    })


def present_model(row: BaseModelRow) -> ModelRead:
    """Return a base model."""
    path = link(f"/models/{row.id}")
    inventory = row.inventory or {}
    layers = inventory.get("layers")
    return ModelRead.model_validate({
        **_columns(row, ModelRead),
        "model_type": inventory.get("model_type"),
        "total_parameters": inventory.get("total_parameters"),
        "num_layers": None if layers is None else len(layers),
        "probe": inventory.get("probe"),
        "links": {"self": path, "layers": f"{path}/layers"},
    })


def describe_unready(row: BaseModelRow) -> str:
    """Return why a base model cannot be used yet, or at all."""
    reason = (row.failure or {}).get("message")
    return f"The model {row.id!r} is {row.status}" + (f": {reason}" if reason else ".")


def present_key(key: ApiKey) -> KeyRead:
    """Return a key without its secret."""
    return KeyRead.model_validate(_columns(key, KeyRead))


def _columns(row: Any, kind: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in kind.model_fields if hasattr(row, name)}
