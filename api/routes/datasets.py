"""Datasets: upload, look, read the report, delete."""

from typing import Any, Final

from anyio import to_thread
from fastapi import Request, Response

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.intake.judgement import intake_limiter
from api.intake.quota import refuse_declared
from api.intake.upload import receive, store_upload
from api.links import link
from api.pagination import Cursor, Limit, NameFilter, printable_filter
from api.presentation import present_dataset
from api.routing import ServiceRouter
from api.schemas.datasets import DatasetPage, DatasetRead, OnBadRows, ReportRead
from store import datasets
from store.database import run_in_transaction, transaction
from store.keys import Scope
from store.models import Dataset, DatasetStatus

router = ServiceRouter("datasets")

_UPLOAD: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSONL; a zip or tar (also .gz, .bz2, .xz) of one JSONL"
                            " and its images; or Parquet with `messages` and `images`.",
                        },
                        "name": {
                            "type": "string",
                            "maxLength": 200,
                            "description": "What you call the dataset.",
                        },
                        "on_bad_rows": {
                            "type": "string",
                            "enum": [each.value for each in OnBadRows],
                            "default": OnBadRows.REJECT.value,
                            "description": "`skip` leaves bad rows out, counted and reported.",
                        },
                    },
                }
            }
        },
    }
}


@router.post(
    "/datasets",
    status_code=201,
    response_model=DatasetRead,
    openapi_extra=_UPLOAD,
    responses=problems(
        "upload_incomplete",
        "upload_too_large",
        "unsupported_media_type",
        "format_not_allowed",
        "dataset_rejected",
        "dataset_invalid",
        "empty_dataset",
        "archive_unsafe_member",
        "archive_limits",
        "filename_invalid",
        "request_invalid",
        "quota_exceeded",
        "storage_full",
    ),
)
@requires(Scope.WRITE)
async def upload_dataset(
    request: Request, response: Response, caller: CallerDep, services: ServicesDep
) -> DatasetRead:
    """Upload a dataset: streamed to disk, checked row by row, stored once by its content."""
    await refuse_declared(request, services, caller.team)
    async with receive(request, max_bytes=services.settings.max_upload_bytes) as upload:
        dataset = await to_thread.run_sync(
            store_upload, services, caller.team, upload, limiter=intake_limiter(services.settings)
        )
    response.headers["Location"] = link(f"/datasets/{dataset.id}")
    return present_dataset(dataset)


@router.get("/datasets", responses=problems("cursor_invalid", "request_invalid"))
@requires(Scope.READ)
def list_datasets(
    caller: CallerDep,
    services: ServicesDep,
    name: NameFilter = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> DatasetPage:
    """List your team's datasets, newest first; also by name."""
    name = printable_filter(name, "name")
    with transaction(services.engine, read_only=True) as session:
        page = datasets.list_datasets(
            session, team=caller.team, name=name, cursor=cursor, limit=limit
        )
        return DatasetPage(data=[present_dataset(row) for row in page.rows], next=page.next)


@router.get("/datasets/{dataset_id}", responses=problems("not_found"))
@requires(Scope.READ)
def read_dataset(dataset_id: str, caller: CallerDep, services: ServicesDep) -> DatasetRead:
    """Return a dataset."""
    return present_dataset(_get(dataset_id, caller, services))


@router.get("/datasets/{dataset_id}/report", responses=problems("not_found"))
@requires(Scope.READ)
def read_report(dataset_id: str, caller: CallerDep, services: ServicesDep) -> ReportRead:
    """Return every bad row of an upload: line, JSON path, image index and reason."""
    dataset = _get(dataset_id, caller, services)
    return ReportRead.model_validate({
        "dataset": dataset.id,
        "status": DatasetStatus(dataset.status),
        "num_rows": dataset.num_rows,
        "num_bad_rows": dataset.num_bad_rows,
        "complete": (dataset.details or {}).get("complete_report", True),
        "errors": dataset.report or [],
    })


@router.delete(
    "/datasets/{dataset_id}", status_code=204, responses=problems("not_found", "still_referenced")
)
@requires(Scope.WRITE)
def delete_dataset(dataset_id: str, caller: CallerDep, services: ServicesDep) -> None:
    """Delete a dataset that no job names."""
    key = run_in_transaction(
        services.engine,
        lambda session: datasets.delete_dataset(session, dataset_id, team=caller.team),
    )
    if key is not None:
        services.objects.delete(key)


def _get(dataset_id: str, caller: CallerDep, services: ServicesDep) -> Dataset:
    with transaction(services.engine, read_only=True) as session:
        return datasets.get_dataset(session, dataset_id, team=caller.team)
