"""The audit on the wire."""

from datetime import datetime

from api.schemas.fields import Answer


class AuditRead(Answer):
    """A change that somebody asked for."""

    sequence: int
    at: datetime
    """By the database's clock."""
    team: str | None
    key_id: str | None
    action: str
    """Method and route, as `POST /jobs/{job_id}/cancel`; or the operator's command."""
    object_id: str | None
    """The ids in the path, and of what was made."""
    status: int
    """As it was answered; 0 of an operator's command."""
    request_id: str | None
    client_address: str | None
    """Who was connected; behind a proxy, the proxy, unless its word is taken for it."""
    previous_sha256: str
    sha256: str


class AuditPage(Answer):
    """Some rows, newest first."""

    data: list[AuditRead]
    next: str | None
    """Cursor of the next page; null: these were the last."""
