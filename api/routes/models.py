"""Base models: list, register, delete, look at their layers."""

from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import Depends, Response
from sqlalchemy.orm import Session

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.errors import InvalidRequest, Problem
from api.links import link
from api.model_names import suggest_models
from api.openai_clients import refuse_openai_clients
from api.presentation import describe_unready, present_model
from api.routing import ServiceRouter
from api.schemas.models import ModelCreate, ModelLayers, ModelList, ModelRead
from api.submission import describe_failure, find_or_register, wait_for_probe
from store import base_models
from store.database import run_in_transaction, transaction
from store.errors import NotFound
from store.keys import Scope
from store.models import BaseModelRow, ModelStatus

router = ServiceRouter("models")


@router.get("/models", dependencies=[Depends(refuse_openai_clients)])
@requires(Scope.READ)
def list_models(services: ServicesDep) -> ModelList:
    """List the base models that this deployment knows, and what else it allows."""
    with transaction(services.engine, read_only=True) as session:
        rows = base_models.list_models(session)
    return ModelList(
        data=[present_model(row) for row in rows], allowed=services.settings.allowed_models
    )


@router.post("/models", status_code=202, responses=problems("model_conflict", "request_invalid"))
@requires(Scope.WRITE)
async def register_model(
    body: ModelCreate,
    response: Response,
    caller: CallerDep,
    services: ServicesDep,
) -> ModelRead:
    """Register a base model; a worker probes it, and `status` becomes `ready` or `failed`.

    A hub id is looked up first: one that the hub does not have, or that cannot be read from here,
    is refused within about a second and not registered. A model that could not be trained fails in
    its probe, with the reason in `failure`: weights that lack tensors, a processor that cannot
    encode a row, default layers that cannot adapt.
    """
    source = body.source or body.id
    pointer = "/source" if body.source else "/id"
    found = await to_thread.run_sync(
        partial(find_or_register, services, caller.team, body.id, source=source, pointer=pointer)
    )
    if isinstance(found, BaseModelRow) and not base_models.is_folder(source):
        found = await wait_for_probe(services, found, until_found=True)
        if base_models.led_nowhere(found):
            found = await to_thread.run_sync(
                partial(describe_failure, services, found, pointer=pointer)
            )
    if not isinstance(found, BaseModelRow):
        raise InvalidRequest([found])
    response.headers["Location"] = link(f"/models/{found.id}")
    return present_model(found)


@router.delete(
    "/models/{model_id:path}", status_code=204, responses=problems("not_found", "still_referenced")
)
@requires(Scope.WRITE)
def delete_model(model_id: str, services: ServicesDep) -> None:
    """Delete a base model that no job and no adapter names. Its files stay where they are."""
    run_in_transaction(services.engine, lambda session: base_models.delete_model(session, model_id))


# Ids hold slashes (`org/name`, `/folder`), so the longer path is declared first.
@router.get("/models/{model_id:path}/layers", responses=problems("not_found", "model_not_ready"))
@requires(Scope.READ)
def read_model_layers(model_id: str, services: ServicesDep) -> ModelLayers:
    """Return the adaptable layers of a base model, by modality."""
    with transaction(services.engine, read_only=True) as session:
        row = _existing(session, model_id)
    if row.status != ModelStatus.READY or row.inventory is None:
        raise Problem("model_not_ready", describe_unready(row))
    modalities: dict[str, list[dict[str, Any]]] = {}
    for layer in row.inventory.get("layers", ()):
        modalities.setdefault(layer.get("modality") or "other", []).append(layer)
    return ModelLayers(
        model=row.id,
        inventory_hash=row.inventory_hash or "",
        modalities=modalities,
        unsupported=row.inventory.get("unsupported", {}),
        bypassed=row.inventory.get("bypassed", {}),
    )


@router.get(
    "/models/{model_id:path}",
    responses=problems("not_found"),
    dependencies=[Depends(refuse_openai_clients)],
)
@requires(Scope.READ)
def read_model(model_id: str, services: ServicesDep) -> ModelRead:
    """Return a base model."""
    with transaction(services.engine, read_only=True) as session:
        return present_model(_existing(session, model_id))


def _existing(session: Session, model_id: str) -> BaseModelRow:
    """Return a base model.

    Raises:
        Problem: There is none of that id; the nearest ids are named.
    """
    try:
        return base_models.get(session, model_id)
    except NotFound as error:
        raise Problem("not_found", f"{error} {suggest_models(session, model_id)}") from None
