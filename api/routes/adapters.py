"""Adapters: import, list, look, download, compress, delete."""

from typing import Annotated, Any, Final, Literal

from anyio import to_thread
from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse

from api.auth import requires
from api.compression import consider_compression
from api.creation import CREATION_PROBLEMS, IdempotencyKey, create_once, once
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.downloads import stored_tar, vllm_tar
from api.errors import InvalidRequest, Item
from api.intake.adapter_files import MAX_FILES
from api.intake.adapters import adapter_of, import_adapter, max_upload_bytes
from api.intake.judgement import intake_limiter
from api.intake.quota import refuse_declared
from api.intake.upload import receive_form
from api.links import link
from api.pagination import Cursor, Limit, NameFilter, printable_filter
from api.presentation import present_adapter
from api.routing import ServiceRouter
from api.schemas.adapters import AdapterCompress, AdapterPage, AdapterRead
from api.schemas.jobs import JobRead
from grit_core.inventory import ModelInventory
from store import adapters, base_models
from store.database import run_in_transaction, transaction
from store.jobs import NewJob
from store.keys import Scope

router = ServiceRouter("adapters")

_COMPRESS: Final = "POST /adapters/{adapter_id}/compress"

_UPLOAD: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "model"],
                    "properties": {
                        "file": {
                            "type": "array",
                            "minItems": 1,
                            "maxItems": MAX_FILES,
                            "items": {"type": "string", "format": "binary"},
                            "description": "A zip or tar (also .gz, .bz2, .xz) of the folder that"
                            " PEFT saved, or its files adapter_config.json and"
                            " adapter_model.safetensors.",
                        },
                        "model": {
                            "type": "string",
                            "description": "The base model that it was trained on, registered.",
                        },
                        "name": {
                            "type": "string",
                            "maxLength": 200,
                            "description": "What you call the adapter.",
                        },
                    },
                }
            }
        },
    }
}


@router.post(
    "/adapters",
    status_code=201,
    response_model=AdapterRead,
    openapi_extra=_UPLOAD,
    responses={
        200: {"description": "The team has imported the same before.", "model": AdapterRead},
        **problems(
            "upload_incomplete",
            "upload_too_large",
            "unsupported_media_type",
            "format_not_allowed",
            "adapter_invalid",
            "adapter_config_invalid",
            "adapter_mismatch",
            "archive_unsafe_member",
            "archive_limits",
            "filename_invalid",
            "request_invalid",
            "model_not_ready",
            "quota_exceeded",
            "storage_full",
        ),
    },
)
@requires(Scope.WRITE)
async def import_one(
    request: Request, response: Response, caller: CallerDep, services: ServicesDep
) -> AdapterRead:
    """Import a LoRA adapter that PEFT saved, trained anywhere on a registered base model.

    It is judged without being loaded: safetensors alone, plain LoRA, every number finite, every
    layer in the base model with the same sizes. Settings are written anew; of the files the
    matrices alone are kept. The same content with the same name, or without one, is imported once.
    """
    await refuse_declared(request, services, caller.team)
    bound = max_upload_bytes(services)
    async with receive_form(request, max_bytes=bound, max_files=MAX_FILES) as form:
        upload = adapter_of(form)
        adapter, is_new = await to_thread.run_sync(
            import_adapter, services, caller.team, upload, limiter=intake_limiter(services.settings)
        )
    if not is_new:
        response.status_code = 200
    response.headers["Location"] = link(f"/adapters/{adapter.id}")
    return present_adapter(adapter)


@router.get("/adapters", responses=problems("cursor_invalid", "request_invalid"))
@requires(Scope.READ)
def list_adapters(
    caller: CallerDep,
    services: ServicesDep,
    name: NameFilter = None,
    model: Annotated[
        str | None,
        Query(max_length=512, pattern=r"^[^\x00-\x1f]*$", description="Only of this base model."),
    ] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> AdapterPage:
    """List your team's adapters, newest first; also by name."""
    name = printable_filter(name, "name")
    with transaction(services.engine, read_only=True) as session:
        page = adapters.list_adapters(
            session, team=caller.team, model=model, name=name, cursor=cursor, limit=limit
        )
        return AdapterPage(data=[present_adapter(row) for row in page.rows], next=page.next)


@router.get("/adapters/{adapter_id}", responses=problems("not_found"))
@requires(Scope.READ)
def read_adapter(adapter_id: str, caller: CallerDep, services: ServicesDep) -> AdapterRead:
    """Return an adapter."""
    with transaction(services.engine, read_only=True) as session:
        return present_adapter(adapters.get_adapter(session, adapter_id, team=caller.team))


@router.get(
    "/adapters/{adapter_id}/download",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "A tar of the folder, for `PeftModel.from_pretrained` or vLLM.",
            "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
        },
        **problems(
            "not_found",
            "request_invalid",
            "adapter_invalid",
            "object_missing",
            "object_corrupt",
        ),
    },
)
@requires(Scope.READ)
def download_adapter(
    adapter_id: str,
    caller: CallerDep,
    services: ServicesDep,
    layout: Annotated[
        Literal["peft", "vllm"], Query(description="`peft`: as it is stored; `vllm`: one rank.")
    ] = "peft",
    language_only: Annotated[  # noqa: FBT002 - a query parameter
        bool, Query(description="For `vllm`: leave out layers outside of the language model.")
    ] = False,
    tower_connector: Annotated[  # noqa: FBT002 - a query parameter
        bool, Query(description="For `vllm`: take those layers along.")
    ] = False,
) -> StreamingResponse:
    """Download an adapter's folder as an uncompressed tar.

    `layout=peft` is the folder as it is stored. `layout=vllm` has one rank and one scale for all
    layers, as vLLM reads it, with the same function. Layers outside of the language model are an
    error, unless `tower_connector=true` takes them, for a vLLM that runs with
    `--enable-tower-connector-lora`, or `language_only=true` leaves them out.
    """
    if language_only and tower_connector:
        detail = "language_only leaves out what tower_connector takes; send one of them."
        raise InvalidRequest([Item(code="value_invalid", detail=detail, parameter="language_only")])
    with transaction(services.engine, read_only=True) as session:
        adapter = adapters.get_adapter(session, adapter_id, team=caller.team)
        known = base_models.get(session, adapter.model).inventory if layout == "vllm" else None
    if known is not None:
        inventory = ModelInventory.from_json(known)
        tar = vllm_tar(
            services.objects,
            adapter.prefix,
            inventory,
            root=adapter.id,
            language_only=language_only,
            tower_connector=tower_connector,
        )
    else:
        manifest = services.objects.read_manifest(adapter.prefix)
        tar = stored_tar(services.objects, adapter.prefix, manifest, root=adapter.id)
    name = f'attachment; filename="{adapter.id}.tar"'
    return StreamingResponse(
        tar.pieces,
        media_type="application/x-tar",
        headers={"Content-Disposition": name, "Content-Length": str(tar.num_bytes)},
    )


@router.post(
    "/adapters/{adapter_id}/compress",
    status_code=202,
    response_model=JobRead,
    responses=problems(
        "not_found",
        "request_invalid",
        "dataset_not_ready",
        "adapter_not_compressible",
        "storage_unavailable",
        *CREATION_PROBLEMS,
    ),
)
@requires(Scope.WRITE)
async def compress_adapter(
    request: Request,
    response: Response,
    adapter_id: str,
    body: AdapterCompress,
    caller: CallerDep,
    services: ServicesDep,
    idempotency_key: IdempotencyKey = None,
) -> JobRead:
    """Create a job that cuts the adapter's weakest directions into a new adapter.

    The job (kind `compression`) is queued at once and moves as every job does. It has no
    checkpoints: after a pause, a lost worker or a retry it begins anew. The adapter itself stays
    as it is, and cannot be deleted while the job is open.
    """

    async def resolve() -> NewJob:
        return await to_thread.run_sync(
            consider_compression, services, caller.team, adapter_id, body
        )

    content = {"adapter": adapter_id, "body": await request.json()}
    mark = once(_COMPRESS, key=idempotency_key, content=content)
    return await create_once(services, caller, response, mark, resolve)


@router.delete(
    "/adapters/{adapter_id}",
    status_code=204,
    responses=problems("not_found", "still_referenced"),
)
@requires(Scope.WRITE)
def delete_adapter(adapter_id: str, caller: CallerDep, services: ServicesDep) -> None:
    """Delete an adapter and its files, unless a job that has not ended is to compress it."""
    prefix = run_in_transaction(
        services.engine,
        lambda session: adapters.delete_adapter(session, adapter_id, team=caller.team),
    )
    services.objects.delete_prefix(prefix)
