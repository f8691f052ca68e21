"""Files: datasets in OpenAI's shape; their purpose is always `fine-tune`."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from anyio import to_thread
from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import FormData, UploadFile

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.errors import InvalidRequest, Item, Problem
from api.intake.judgement import intake_limiter
from api.intake.quota import refuse_declared
from api.intake.upload import Upload, receive_form, store_upload, upload_of
from api.links import link
from api.openai.models import seconds
from api.openai.pages import MAX_ROWS, After, Rows, cursor_after
from api.openai.schemas.files import OpenAIFile, OpenAIFileList
from api.openai.schemas.models import OpenAIDeleted
from api.routes.datasets import delete_dataset
from api.routing import ServiceRouter
from api.schemas.datasets import OnBadRows
from store import datasets
from store.database import transaction
from store.keys import Scope
from store.models import Dataset, DatasetStatus

router = ServiceRouter("openai")

PURPOSE: Final = "fine-tune"
_MAX_NAME: Final = 200
_EXPIRY: Final = "expires_after"
_STATUSES: Final[dict[DatasetStatus, Any]] = {
    DatasetStatus.VALIDATING: "uploaded",
    DatasetStatus.READY: "processed",
    DatasetStatus.REJECTED: "error",
}
_UPLOAD: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "Chat rows as JSONL, images inside as data URLs; or"
                            " whatever else `POST /datasets` takes.",
                        },
                        "purpose": {
                            "type": "string",
                            "enum": [PURPOSE],
                            "description": "Files are what jobs train on.",
                        },
                        "on_bad_rows": {
                            "type": "string",
                            "enum": [each.value for each in OnBadRows],
                            "default": OnBadRows.REJECT.value,
                            "description": "Ours: `skip` leaves bad rows out, counted.",
                        },
                    },
                }
            }
        },
    }
}


@router.post(
    "/v1/files",
    response_model=OpenAIFile,
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
async def upload_file(
    request: Request, response: Response, caller: CallerDep, services: ServicesDep
) -> OpenAIFile:
    """Upload a dataset: checked row by row now, so that a file that is there can be trained on."""
    await refuse_declared(request, services, caller.team)
    async with receive_form(request, max_bytes=services.settings.max_upload_bytes) as form:
        upload = _upload(form)
        dataset = await to_thread.run_sync(
            store_upload, services, caller.team, upload, limiter=intake_limiter(services.settings)
        )
    response.headers["Location"] = link(f"/v1/files/{dataset.id}")
    return present_file(dataset)


@router.get("/v1/files", responses=problems("request_invalid"))
@requires(Scope.READ)
def list_files(
    caller: CallerDep,
    services: ServicesDep,
    after: After = None,
    limit: Rows = MAX_ROWS,
    order: Annotated[Literal["desc"], Query(description="Newest first, always.")] = "desc",  # noqa: ARG001 - refuses the other one
    purpose: Annotated[
        str | None, Query(max_length=64, description="Only `fine-tune`: all files have it.")
    ] = None,
) -> OpenAIFileList:
    """List your team's files, newest first."""
    cursor = cursor_after(after, kind="ds")
    if purpose not in {None, PURPOSE}:
        return OpenAIFileList(data=[], first_id=None, last_id=None, has_more=False)
    with transaction(services.engine, read_only=True) as session:
        page = datasets.list_datasets(
            session, team=caller.team, cursor=cursor, limit=min(limit, MAX_ROWS)
        )
        data = [present_file(row) for row in page.rows]
    return OpenAIFileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.next is not None,
    )


@router.get("/v1/files/{file_id}", responses=problems("not_found"))
@requires(Scope.READ)
def read_file(file_id: str, caller: CallerDep, services: ServicesDep) -> OpenAIFile:
    """Return a file's facts."""
    with transaction(services.engine, read_only=True) as session:
        return present_file(datasets.get_dataset(session, file_id, team=caller.team))


@router.get(
    "/v1/files/{file_id}/content",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The stored rows: JSONL, images inside as data URLs.",
            "content": {"application/jsonl": {"schema": {"type": "string", "format": "binary"}}},
        },
        **problems("not_found", "dataset_not_ready", "object_missing", "object_corrupt"),
    },
)
@requires(Scope.READ)
def read_file_content(file_id: str, caller: CallerDep, services: ServicesDep) -> StreamingResponse:
    """Download a file's rows in their stored form, whatever they were uploaded as."""
    with transaction(services.engine, read_only=True) as session:
        dataset = datasets.get_dataset(session, file_id, team=caller.team)
    if dataset.object_key is None:
        detail = f"The file is {present_file(dataset).status}: its rows were not stored."
        raise Problem("dataset_not_ready", detail)
    chunks = services.objects.open_stream(dataset.object_key)
    return StreamingResponse(without_blank_lines(chunks), media_type="application/jsonl")


@router.delete("/v1/files/{file_id}", responses=problems("not_found", "still_referenced"))
@requires(Scope.WRITE)
def delete_file(file_id: str, caller: CallerDep, services: ServicesDep) -> OpenAIDeleted:
    """Delete a file that no job names."""
    delete_dataset(file_id, caller, services)
    return OpenAIDeleted(id=file_id, object="file")


def present_file(dataset: Dataset) -> OpenAIFile:
    """Return a dataset as a file."""
    status = DatasetStatus(dataset.status)
    refused = f"{dataset.num_bad_rows} bad rows; the report: GET /datasets/{dataset.id}/report"
    return OpenAIFile(
        id=dataset.id,
        bytes=dataset.size_bytes or 0,
        created_at=seconds(dataset.created_at),
        filename=dataset.name or f"{dataset.id}.jsonl",
        status=_STATUSES[status],
        status_details=refused if status == DatasetStatus.REJECTED else None,
    )


def without_blank_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield stored rows without the blank lines that stand for lines which were left out."""
    at_line_start = True
    for chunk in chunks:
        if at_line_start:
            chunk = chunk.lstrip(b"\n")  # noqa: PLW2901 - the same bytes, less their blank lines
        if chunk:
            at_line_start = chunk.endswith(b"\n")
            yield re.sub(rb"\n{2,}", b"\n", chunk)


def _upload(form: FormData) -> Upload:
    """Return what a form uploads: its file is a dataset of the file's name.

    Raises:
        InvalidRequest: If the purpose is another one, or there are other fields.
    """
    faults = []
    if form.getlist("purpose") != [PURPOSE]:
        detail = f"`purpose` is {PURPOSE!r}: files are what jobs train on."
        faults.append(Item(code="value_invalid", detail=detail, pointer="/purpose"))
    if any(name.partition("[")[0] == _EXPIRY for name in form):
        detail = f"`{_EXPIRY}` is not supported here: files stay until they are deleted."
        faults.append(Item(code="parameter_unsupported", detail=detail, pointer=f"/{_EXPIRY}"))
    if faults:
        raise InvalidRequest(faults)
    rest = [(name, value) for name, value in form.multi_items() if name != "purpose"]
    upload = upload_of(FormData(rest))
    file = form["file"]
    filename = file.filename if isinstance(file, UploadFile) else None
    return replace(upload, name=upload.name or (filename or "")[:_MAX_NAME] or None)
