"""Teams and their API keys: `grit_<prefix>_<secret>`, of which only a hash is stored."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy.orm import Session

from store.models import ApiKey, Team


class Scope(StrEnum):
    """What a key may do."""

    READ = "read"
    WRITE = "write"
    INFER = "infer"
    ADMIN = "admin"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks."""

    team: str
    scopes: frozenset[Scope]
    key_id: str


def ensure_team(session: Session, name: str) -> Team:
    """Return the team of a name, made now if there is none.

    Raises:
        ValueError: If the name is not 1 to 64 of `a-z`, `0-9`, `-`, `_` and `.`.
    """
    raise NotImplementedError


def create_key(
    session: Session,
    *,
    team: str,
    name: str,
    scopes: frozenset[Scope] | set[Scope],
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """Make a key for a team (made if new), and return its row and the only copy of its text.

    Raises:
        ValueError: If no scope is given.
    """
    raise NotImplementedError


def authenticate(session: Session, token: str) -> Caller:
    """Return who a key's text belongs to, in time that does not tell whether its prefix exists.

    Raises:
        InvalidKey: If it is malformed, unknown, revoked or expired.
    """
    raise NotImplementedError


def list_keys(session: Session, *, team: str | None = None) -> list[ApiKey]:
    """Return the keys of a team, or of all teams, the oldest first."""
    raise NotImplementedError


def revoke_key(session: Session, key_id: str, *, team: str | None = None) -> ApiKey:
    """Make a key invalid from now on; again changes nothing.

    Raises:
        NotFound: If there is no such key, or it is another team's.
    """
    raise NotImplementedError
