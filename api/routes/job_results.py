"""What a job measured and stored: metrics, layers, checkpoints, the manifest."""

import csv
import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Final

from fastapi import Query, Request, Response
from sqlalchemy.orm import Session

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.presentation import finite, present_attempt
from api.routing import ServiceRouter
from api.schemas.jobs import (
    AttemptList,
    CheckpointList,
    CheckpointRead,
    LayerRead,
    LayersRead,
    ManifestRead,
    MetricsRead,
)
from store import adapters, attempts, base_models, datasets, events, jobs
from store.database import transaction
from store.keys import Scope
from store.models import Dataset, Job, JobKind, LayerStatistics, Metric

router = ServiceRouter("jobs")

_COLUMNS: Final = (
    "step",
    "epoch",
    "train_loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "num_tokens",
    "tokens_per_second",
    "elapsed_seconds",
)
_BY_MODALITY: Final = ("effective_rank", "fisher_energy")
_BY_MODALITY_IF_OBSERVED: Final = ("requested_budget", "effective_budget", "predicted_kl")
_LAST_OBSERVED: Final = ("effective_rank", "fisher_energy", "active", "predicted_kl")
_MAX_HISTORY: Final = 100


@router.get(
    "/jobs/{job_id}/metrics",
    response_model=MetricsRead,
    responses={
        200: {
            "description": "Series of equal length; or, with `Accept: text/csv`, one row a step.",
            "content": {"text/csv": {"schema": {"type": "string"}}},
        },
        **problems("not_found"),
    },
)
@requires(Scope.READ)
def read_metrics(
    request: Request,
    job_id: str,
    caller: CallerDep,
    services: ServicesDep,
    max_points: Annotated[
        int, Query(ge=2, le=100_000, description="Keep at most about so many steps.")
    ] = 2000,
    after_step: Annotated[
        int, Query(ge=-1, le=2**31 - 1, description="Only steps after this one.")
    ] = -1,
) -> Response:
    """Return what each step measured, thinned to `max_points` (evaluated steps always stay)."""
    with transaction(services.engine, read_only=True) as session:
        jobs.get_job(session, job_id, team=caller.team)
        rows = events.read_metrics(session, job_id, after_step=after_step)
    series = _series(_thinned(rows, max_points))
    if "text/csv" in request.headers.get("accept", ""):
        name = f'attachment; filename="{job_id}-metrics.csv"'
        return Response(_csv(series), media_type="text/csv", headers={"Content-Disposition": name})
    answer = MetricsRead(job=job_id, steps=len(rows), series=series)
    return Response(answer.model_dump_json(), media_type="application/json")


def _thinned(rows: Sequence[Metric], bound: int) -> list[Metric]:
    """Keep every nth step, the last one, and those that were evaluated."""
    if len(rows) <= bound:
        return list(rows)
    stride = -(-len(rows) // bound)
    last = len(rows) - 1
    return [
        row
        for index, row in enumerate(rows)
        if index % stride == 0 or index == last or row.eval_loss is not None
    ]


def _series(rows: Sequence[Metric]) -> dict[str, list[Any]]:
    series: dict[str, list[Any]] = {
        name: [finite(getattr(row, name)) for row in rows] for name in _COLUMNS
    }
    observed = [row.modalities or {} for row in rows]
    modalities = sorted({name for each in observed for name in each})
    for measure in (*_BY_MODALITY, *_BY_MODALITY_IF_OBSERVED):
        for modality in modalities:
            told = [each.get(modality, {}) for each in observed]
            if measure in _BY_MODALITY or any(measure in each for each in told):
                series[f"{measure}.{modality}"] = [finite(each.get(measure)) for each in told]
    return series


def _csv(series: dict[str, list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(series)
    writer.writerows(zip(*series.values(), strict=True))
    return text.getvalue()


@router.get("/jobs/{job_id}/layers", responses=problems("not_found"))
@requires(Scope.READ)
def read_layers(job_id: str, caller: CallerDep, services: ServicesDep) -> LayersRead:
    """Return every adapted layer with its curvature over time."""
    with transaction(services.engine, read_only=True) as session:
        job = jobs.get_job(session, job_id, team=caller.team)
        observed = _some(events.read_layer_statistics(session, job_id), _MAX_HISTORY)
    ranks = ((job.result or {}).get("compaction") or {}).get("ranks", {})
    layers = [_layer(planned, observed, ranks) for planned in job.plan.get("layers", ())]
    return LayersRead(job=job_id, layers=layers)


def _some(rows: Sequence[LayerStatistics], bound: int) -> list[LayerStatistics]:
    stride = max(1, -(-len(rows) // bound))
    kept = list(rows[::stride])
    if rows and kept[-1] is not rows[-1]:
        kept.append(rows[-1])
    return kept


def _layer(
    planned: dict[str, Any], observed: Iterable[LayerStatistics], ranks: Mapping[str, int]
) -> LayerRead:
    name = planned["name"]
    history = [{"step": row.step, **row.layers[name]} for row in observed if name in row.layers]
    last = history[-1] if history else {}
    return LayerRead.model_validate({
        **{key: planned[key] for key in LayerRead.model_fields if key in planned},
        **{key: last.get(key) for key in _LAST_OBSERVED},
        "compacted_rank": ranks.get(name),
        "history": history,
    })


@router.get("/jobs/{job_id}/checkpoints", responses=problems("not_found"))
@requires(Scope.READ)
def read_checkpoints(job_id: str, caller: CallerDep, services: ServicesDep) -> CheckpointList:
    """Return the stored points that the job can resume from."""
    with transaction(services.engine, read_only=True) as session:
        jobs.get_job(session, job_id, team=caller.team)
        rows = attempts.list_checkpoints(session, job_id)
    data = [
        CheckpointRead(
            step=row.step,
            attempt=row.attempt,
            size_bytes=row.size_bytes,
            manifest_sha256=row.manifest_sha256,
            current=row is rows[-1],
            created_at=row.created_at,
        )
        for row in rows
    ]
    return CheckpointList(job=job_id, data=data)


@router.get("/jobs/{job_id}/attempts", responses=problems("not_found"))
@requires(Scope.READ)
def read_attempts(job_id: str, caller: CallerDep, services: ServicesDep) -> AttemptList:
    """Return every execution of the job: where it began, how far it came, and why it ended."""
    with transaction(services.engine, read_only=True) as session:
        jobs.get_job(session, job_id, team=caller.team)
        executed = jobs.list_attempts(session, job_id)
    return AttemptList(job=job_id, data=[present_attempt(attempt) for attempt in executed])


@router.get("/jobs/{job_id}/manifest", responses=problems("not_found"))
@requires(Scope.READ)
def read_manifest(job_id: str, caller: CallerDep, services: ServicesDep) -> ManifestRead:
    """Return all that reproduces the job: resolved settings, hashes, versions, seed, device."""
    team = caller.team
    with transaction(services.engine, read_only=True) as session:
        job = jobs.get_job(session, job_id, team=team)
        model = base_models.get(session, job.model)
        used = {
            "dataset": job.dataset_id,
            "eval_dataset": job.eval_dataset_id,
            "retention_dataset": job.retention_dataset_id,
        }
        content = {
            role: None
            if each is None
            else _identity(datasets.get_dataset(session, each, team=team))
            for role, each in used.items()
        }
        source = _source(session, job)
        executed = jobs.list_attempts(session, job_id)
    return ManifestRead(
        job=job.id,
        kind=JobKind(job.kind),
        request=job.request,
        config=job.config,
        training=job.training,
        plan=job.plan,
        plan_hash=job.plan_hash,
        model={"id": model.id, "source": model.source, "inventory_hash": model.inventory_hash},
        **content,
        source_adapter=source,
        device=job.device,
        seed=job.training.get("seed"),
        versions={"grit-service": version("grit-service"), "api_python": platform.python_version()},
        attempts=[present_attempt(attempt) for attempt in executed],
        result=job.result,
    )


def _identity(dataset: Dataset) -> dict[str, Any]:
    return {
        "id": dataset.id,
        "sha256": dataset.sha256,
        "num_rows": dataset.num_rows,
        "size_bytes": dataset.size_bytes,
    }


def _source(session: Session, job: Job) -> dict[str, Any] | None:
    if job.kind != JobKind.COMPRESSION:
        return None
    if job.source_adapter_id is None:  # deleted since
        return {"id": job.request.get("adapter"), "sha256": None}
    source = adapters.get_adapter(session, job.source_adapter_id, team=job.team)
    return {"id": source.id, "sha256": source.sha256}
