"""The audit: who asked for which change, for administrators."""

from typing import Annotated

from fastapi import Query

from api.auth import requires
from api.dependencies import ServicesDep
from api.documents import problems
from api.errors import Item, Problem
from api.pagination import Cursor, Limit
from api.routing import ServiceRouter
from api.schemas.audit import AuditPage, AuditRead
from api.schemas.fields import Moment
from store import audit
from store.database import transaction
from store.keys import Scope
from store.models import AuditRow

router = ServiceRouter("audit")


@router.get("/audit", responses=problems("cursor_invalid", "request_invalid"))
@requires(Scope.ADMIN)
def list_audit(
    services: ServicesDep,
    team: Annotated[
        str | None,
        Query(max_length=64, pattern=r"^[a-z0-9._-]*$", description="Only of this team."),
    ] = None,
    since: Annotated[Moment | None, Query(description="Not older; with a time zone.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> AuditPage:
    """List the changes that were asked for, newest first. Rows appear within a second or so."""
    if since is not None and since.tzinfo is None:
        detail = "`since` has no time zone; write 2026-01-31T12:00:00Z."
        item = Item(code="value_invalid", detail=detail, parameter="query.since")
        raise Problem("request_invalid", detail, errors=[item])
    with transaction(services.engine, read_only=True) as session:
        page = audit.read_audit(session, team=team, since=since, cursor=cursor, limit=limit)
    return AuditPage(data=[_present(row) for row in page.rows], next=page.next)


def _present(row: AuditRow) -> AuditRead:
    return AuditRead.model_validate({name: getattr(row, name) for name in AuditRead.model_fields})
