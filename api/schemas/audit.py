"""The audit on the wire."""

from datetime import datetime

from api.schemas.fields import Answer


class AuditRead(Answer):
    """A change that somebody asked for."""

    sequence: int
    """Number of the row; each is higher than the one before."""
    at: datetime
    """By the database's clock."""
    team: str | None
    """Team of the key; null for an operator's command."""
    key_id: str | None
    """Id of the key; null for an operator's command."""
    action: str
    """Method and route, as `POST /jobs/{job_id}/cancel`; or the operator's command."""
    object_id: str | None
    """The ids in the path, and of what was made."""
    status: int
    """As it was answered; 0 of an operator's command."""
    request_id: str | None
    """`X-Request-Id` of the answer; null for an operator's command."""
    client_address: str | None
    """Who was connected; behind a proxy, the proxy, unless its word is taken for it."""
    previous_sha256: str
    """`sha256` of the row before."""
    sha256: str
    """SHA-256 of this row's fields and of `previous_sha256`."""


class AuditPage(Answer):
    """Some rows, newest first."""

    data: list[AuditRead]
    """The rows of this page."""
    next: str | None
    """Cursor of the next page; null: these were the last."""
