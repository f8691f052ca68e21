"""Teams and their API keys: `grit_<prefix>_<secret>`, of which only a hash is stored."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from sqlalchemy import ColumnElement, and_, case, func, or_, select, update
from sqlalchemy.orm import Session

from store.database_time import database_now, database_time_in
from store.dialects import insert_unless_there
from store.errors import InvalidKey, NotFound
from store.ids import new_id
from store.models import ApiKey, Team

_TOKEN: Final = re.compile(r"grit_([0-9a-f]{12})_([\w-]{43})", re.ASCII)
_TEAM_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NO_SECRET: Final = hashlib.sha256(b"").hexdigest()
_USE_KNOWN_FOR_SECONDS: Final = 60.0


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
    requests_per_minute: int | None = None
    """The team's own rate, if it has one."""
    submissions_per_minute: int | None = None
    """Likewise."""
    use_is_old: bool = False
    """Whether `record_use` is due: at most once a minute, so that reading stays reading."""


def ensure_team(session: Session, name: str) -> Team:
    """Return the team of a name, made now if there is none.

    Raises:
        ValueError: If the name is not 1 to 64 of `a-z`, `0-9`, `-`, `_` and `.`.
    """
    if _TEAM_NAME.fullmatch(name) is None:
        raise ValueError(
            f"team {name!r} must be 1 to 64 of a-z, 0-9, '-', '_' and '.', and begin with one of"
            " the first two kinds"
        )
    insert_unless_there(session, Team, {"name": name})
    return session.get_one(Team, name)


def create_key(
    session: Session,
    *,
    team: str,
    name: str,
    scopes: Collection[Scope],
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """Make a key for a team (made if new), and return its row and the only copy of its text.

    Raises:
        ValueError: If no scope is given.
    """
    if not scopes:
        raise ValueError(f"a key needs a scope; one or more of {', '.join(Scope)}")
    ensure_team(session, team)
    prefix = secrets.token_hex(6)
    secret = secrets.token_urlsafe(32)
    key = ApiKey(
        id=new_id("key"),
        team=team,
        name=name,
        prefix=prefix,
        secret_sha256=hashlib.sha256(secret.encode()).hexdigest(),
        scopes=sorted(Scope(scope) for scope in scopes),
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    return key, f"grit_{prefix}_{secret}"


def authenticate(session: Session, token: str) -> Caller:
    """Return who a key's text belongs to, in time that does not tell whether its prefix exists.

    Raises:
        InvalidKey: If it is malformed, unknown, revoked or expired.
    """
    found = _TOKEN.fullmatch(token)
    prefix, secret = (found[1], found[2]) if found is not None else ("", "")
    row = session.execute(
        select(ApiKey, _usable(), _use_is_old(), Team)
        .join(Team, Team.name == ApiKey.team)
        .where(ApiKey.prefix == prefix)
    ).one_or_none()
    # Without a row the comparison is still made, so that its time says nothing of the prefix.
    expected = row[0].secret_sha256 if row is not None else _NO_SECRET
    given = hashlib.sha256(secret.encode()).hexdigest()
    matches = hmac.compare_digest(given, expected)
    if row is None or not matches or not row[1]:
        raise InvalidKey("The API key is unknown, revoked or expired.")
    key = row[0]
    return Caller(
        team=key.team,
        scopes=frozenset(Scope(scope) for scope in key.scopes),
        key_id=key.id,
        requests_per_minute=row[3].requests_per_minute,
        submissions_per_minute=row[3].submissions_per_minute,
        use_is_old=bool(row[2]),
    )


def record_use(session: Session, caller: Caller) -> None:
    """Note that a key is in use; call it where `caller.use_is_old`, in a writing transaction."""
    session.execute(
        update(ApiKey).where(ApiKey.id == caller.key_id).values(last_used_at=database_now()),
        execution_options={"synchronize_session": False},
    )


def list_keys(session: Session, *, team: str | None = None) -> list[ApiKey]:
    """Return the keys of a team, or of all teams, the oldest first."""
    statement = select(ApiKey).order_by(ApiKey.id)
    if team is not None:
        statement = statement.where(ApiKey.team == team)
    return list(session.scalars(statement))


def revoke_key(session: Session, key_id: str, *, team: str | None = None) -> ApiKey:
    """Make a key invalid from now on; again changes nothing.

    Raises:
        NotFound: If there is no such key, or it is another team's.
    """
    statement = update(ApiKey).where(ApiKey.id == key_id)
    if team is not None:
        statement = statement.where(ApiKey.team == team)
    key = session.scalars(
        statement.values(revoked_at=func.coalesce(ApiKey.revoked_at, database_now())).returning(
            ApiKey
        ),
        execution_options={"synchronize_session": False, "populate_existing": True},
    ).one_or_none()
    if key is None:
        raise NotFound("key", key_id)
    return key


def _usable() -> ColumnElement[bool]:
    alive = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > database_now())
    return case((and_(ApiKey.revoked_at.is_(None), alive), 1), else_=0)


def _use_is_old() -> ColumnElement[bool]:
    since = database_time_in(-_USE_KNOWN_FOR_SECONDS)
    return case((or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < since), 1), else_=0)
