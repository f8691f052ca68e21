"""API keys: make, list, rotate, revoke; for administrators, who are so for all teams."""

from datetime import datetime

from fastapi import Request, Response

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.errors import InvalidRequest, Item
from api.links import link
from api.presentation import present_key
from api.routing import ServiceRouter
from api.schemas.keys import KeyCreate, KeyCreated, KeyList, KeyRotate
from store import keys
from store.database import run_in_transaction, transaction
from store.keys import Scope

router = ServiceRouter("keys")


@router.post("/keys", status_code=201, responses=problems("request_invalid"))
@requires(Scope.ADMIN)
def create_key(
    body: KeyCreate, response: Response, caller: CallerDep, services: ServicesDep
) -> KeyCreated:
    """Make a key; its text is in this answer and nowhere else."""
    expires_at = _expiry_of(body)
    row, text = run_in_transaction(
        services.engine,
        lambda session: keys.create_key(
            session,
            team=body.team or caller.team,
            name=body.name,
            scopes=set(body.scopes),
            expires_at=expires_at,
        ),
    )
    response.headers["Location"] = link(f"/keys/{row.id}")
    return KeyCreated(**present_key(row).model_dump(), key=text)


@router.get("/keys")
@requires(Scope.ADMIN)
def list_keys(services: ServicesDep) -> KeyList:
    """List the keys of all teams, without their secrets."""
    with transaction(services.engine, read_only=True) as session:
        return KeyList(data=[present_key(row) for row in keys.list_keys(session)])


@router.post(
    "/keys/{key_id}/rotate",
    status_code=201,
    responses=problems("not_found", "key_ended", "request_invalid"),
)
@requires(Scope.ADMIN)
def rotate_key(
    key_id: str, body: KeyRotate, request: Request, response: Response, services: ServicesDep
) -> KeyCreated:
    """Make a key in another's place: of the same team, with the same name and scopes.

    The old key goes on for `overlap_seconds`, so that its users can change over; its new end is in
    `expires_at` of the list, and the key in its place in `replaced_by`.
    """
    expires_at = _expiry_of(body)
    row, text = run_in_transaction(
        services.engine,
        lambda session: keys.rotate_key(
            session, key_id, overlap_seconds=body.overlap_seconds, expires_at=expires_at
        ),
    )
    request.app.state.doorkeeper.forget()
    response.headers["Location"] = link(f"/keys/{row.id}")
    return KeyCreated(**present_key(row).model_dump(), key=text)


@router.delete("/keys/{key_id}", status_code=204, responses=problems("not_found"))
@requires(Scope.ADMIN)
def revoke_key(key_id: str, request: Request, services: ServicesDep) -> None:
    """Revoke a key; other API processes notice within seconds."""
    run_in_transaction(services.engine, lambda session: keys.revoke_key(session, key_id))
    request.app.state.doorkeeper.forget()


def _expiry_of(body: KeyCreate | KeyRotate) -> datetime | None:
    """Return when a key is to end.

    Raises:
        InvalidRequest: If that cannot be.
    """
    try:
        return keys.expiry_of(expires_at=body.expires_at, expires_in_days=body.expires_in_days)
    except ValueError as error:
        detail = f"{error}."
        raise InvalidRequest([
            Item(code="value_invalid", detail=detail, pointer="/expires_at")
        ]) from None
