"""API keys: make, list, revoke; for administrators."""

from fastapi import Request, Response

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.errors import InvalidRequest, Item
from api.presentation import present_key
from api.routing import service_router
from api.schemas.keys import KeyCreate, KeyCreated, KeyList
from store import keys
from store.database import run_in_transaction, transaction
from store.keys import Scope

router = service_router("keys")


@router.post("/keys", status_code=201, responses=problems("request_invalid"))
@requires(Scope.ADMIN)
def create_key(
    body: KeyCreate, response: Response, caller: CallerDep, services: ServicesDep
) -> KeyCreated:
    """Make a key; its text is in this answer and nowhere else."""
    if body.expires_at is not None and body.expires_at.tzinfo is None:
        detail = "`expires_at` has no time zone; write 2027-01-31T12:00:00Z."
        raise InvalidRequest([Item(code="value_invalid", detail=detail, pointer="/expires_at")])
    row, text = run_in_transaction(
        services.engine,
        lambda session: keys.create_key(
            session,
            team=body.team or caller.team,
            name=body.name,
            scopes=set(body.scopes),
            expires_at=body.expires_at,
        ),
    )
    response.headers["Location"] = f"/keys/{row.id}"
    return KeyCreated(**present_key(row).model_dump(), key=text)


@router.get("/keys")
@requires(Scope.ADMIN)
def list_keys(services: ServicesDep) -> KeyList:
    """List the keys of all teams, without their secrets."""
    with transaction(services.engine, read_only=True) as session:
        return KeyList(data=[present_key(row) for row in keys.list_keys(session)])


@router.delete("/keys/{key_id}", status_code=204, responses=problems("not_found"))
@requires(Scope.ADMIN)
def revoke_key(key_id: str, request: Request, services: ServicesDep) -> None:
    """Revoke a key; other API processes notice within seconds."""
    run_in_transaction(services.engine, lambda session: keys.revoke_key(session, key_id))
    request.app.state.doorkeeper.forget()
