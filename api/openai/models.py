"""Models: the base models that are ready, and the team's adapters beside them."""

from datetime import datetime
from typing import Final, NoReturn

from sqlalchemy.orm import Session

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.errors import Item, Problem
from api.model_names import describe_other_model, suggest_models
from api.openai.schemas.models import ModelFacts, OpenAIDeleted, OpenAIModel, OpenAIModelList
from api.routes.adapters import delete_adapter
from api.routing import ServiceRouter
from store import adapters, base_models
from store.database import transaction
from store.errors import NotFound
from store.ids import is_id
from store.keys import Scope
from store.models import Adapter, BaseModelRow, ModelStatus

router = ServiceRouter("openai")

_OWNER: Final = "grit"
_BATCH: Final = 200


@router.get("/v1/models")
@requires(Scope.READ)
def list_openai_models(caller: CallerDep, services: ServicesDep) -> OpenAIModelList:
    """List the base models that are ready, and your team's adapters, newest first."""
    with transaction(services.engine, read_only=True) as session:
        bases = [row for row in base_models.list_models(session) if row.status == ModelStatus.READY]
        own = _adapters(session, caller.team)
        return OpenAIModelList(data=[*map(present, bases), *map(present, own)])


@router.get("/v1/models/{model:path}", responses=problems("not_found"))
@requires(Scope.READ)
def read_openai_model(model: str, caller: CallerDep, services: ServicesDep) -> OpenAIModel:
    """Return a base model or an adapter."""
    with transaction(services.engine, read_only=True) as session:
        found = find_model(session, caller.team, model)
        if isinstance(found, BaseModelRow) and found.status != ModelStatus.READY:
            _missing(model)
        return present(found)


@router.delete("/v1/models/{model:path}", responses=problems("not_found", "still_referenced"))
@requires(Scope.WRITE)
def delete_openai_model(model: str, caller: CallerDep, services: ServicesDep) -> OpenAIDeleted:
    """Delete an adapter, as `DELETE /adapters/{id}` does; base models stay."""
    with transaction(services.engine, read_only=True) as session:
        found = find_model(session, caller.team, model)
    if isinstance(found, BaseModelRow):
        detail = f"{model!r} is a base model of this deployment; only adapters can be deleted."
        item = Item(code="not_an_adapter", detail=detail, parameter="path.model")
        raise Problem("request_invalid", detail, errors=[item])
    delete_adapter(model, caller, services)
    return OpenAIDeleted(id=model, object="model")


def find_model(session: Session, team: str, name: str) -> BaseModelRow | Adapter:
    """Return what a `model` names: an adapter of the team, or a base model, ready or not.

    Raises:
        Problem: If there is no such model for this team.
    """
    if not is_id(name, "adp"):
        row = base_models.find_existing(session, name)
        if row is None:
            other = describe_other_model(session, team, name)
            _missing(name, hint=f" {other or suggest_models(session, name)}")
        return row
    try:
        return adapters.get_adapter(session, name, team=team)
    except NotFound:
        _missing(name)


def _missing(name: str, *, hint: str = "") -> NoReturn:
    detail = (
        f"The model {name!r} does not exist, or is not yours; GET /v1/models lists those.{hint}"
    )
    item = Item(code="model_not_found", detail=detail, pointer="/model", input=name)
    raise Problem("not_found", detail, errors=[item])


def _adapters(session: Session, team: str) -> list[Adapter]:
    rows: list[Adapter] = []
    cursor: str | None = None
    while True:
        page = adapters.list_adapters(session, team=team, cursor=cursor, limit=_BATCH)
        rows += page.rows
        cursor = page.next
        if cursor is None:
            return rows


def present(row: BaseModelRow | Adapter) -> OpenAIModel:
    """Return a model as OpenAI's clients read it."""
    if isinstance(row, BaseModelRow):
        facts = ModelFacts(base_model=row.id, name=None, job=None)
        owner = _OWNER
    else:
        facts = ModelFacts(base_model=row.model, name=row.name, job=row.job_id)
        owner = row.team
    return OpenAIModel(id=row.id, created=seconds(row.created_at), owned_by=owner, grit=facts)


def seconds(moment: datetime) -> int:
    """Return a moment as OpenAI writes it: whole seconds since 1970."""
    return int(moment.timestamp())
