"""Teams and their API keys: `grit_<prefix>_<secret>`, of which only a hash is stored."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from sqlalchemy import ColumnElement, and_, bindparam, case, func, literal, or_, select, update
from sqlalchemy.orm import Session

from store.database_time import database_now, database_time_in
from store.dialects import insert_unless_there
from store.errors import InvalidKey, KeyEnded, NotFound
from store.ids import new_id
from store.models import ApiKey, Team

_TOKEN: Final = re.compile(r"grit_([0-9a-f]{12})_([\w-]{43})", re.ASCII)
_TEAM_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NO_SECRET: Final = hashlib.sha256(b"").hexdigest()
_USE_KNOWN_FOR_SECONDS: Final = 60.0
MAX_LIFETIME_DAYS: Final = 3650
"""Longest life of a key that ends at all."""
DEFAULT_OVERLAP_SECONDS: Final = 86_400
MAX_OVERLAP_SECONDS: Final = 30 * 86_400
"""Longest time for which a rotated key goes on beside the new one."""


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


def expiry_of(*, expires_at: datetime | None, expires_in_days: float | None) -> datetime | None:
    """Return when a key is to end, said in one of two ways; none: never.

    Raises:
        ValueError: If it is said in both ways, without a time zone, in the past or too far away.
    """
    if expires_at is not None and expires_in_days is not None:
        raise ValueError("say `expires_at` or `expires_in_days`, and not both")
    if expires_in_days is not None:
        # Also refuses what is not a number.
        if not 0 < expires_in_days <= MAX_LIFETIME_DAYS:
            raise ValueError(
                f"`expires_in_days` is {expires_in_days}; it is above 0 and at most"
                f" {MAX_LIFETIME_DAYS}"
            )
        return datetime.now(UTC) + timedelta(days=expires_in_days)
    if expires_at is None:
        return None
    if expires_at.tzinfo is None:
        raise ValueError("`expires_at` has no time zone; write 2027-01-31T12:00:00Z")
    now = datetime.now(UTC)
    if not now < expires_at <= now + timedelta(days=MAX_LIFETIME_DAYS):
        raise ValueError(
            f"`expires_at` is {expires_at.isoformat()}; it is in the future, and at most"
            f" {MAX_LIFETIME_DAYS} days away"
        )
    return expires_at


def rotate_key(
    session: Session,
    key_id: str,
    *,
    overlap_seconds: float = DEFAULT_OVERLAP_SECONDS,
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """Make a key in another's place: of the same team, with the same name and scopes.

    The old one stays valid for the overlap, and no longer than it would have; with 0 it ends now.
    Without `expires_at` the new key lives as long as the old one was given, or for ever.

    Returns:
        The new row, and the only copy of the new key's text.

    Raises:
        NotFound: If there is no such key.
        KeyEnded: If it is revoked, expired or replaced already.
        ValueError: If the overlap is out of bounds.
    """
    if not 0 <= overlap_seconds <= MAX_OVERLAP_SECONDS:
        raise ValueError(
            f"`overlap_seconds` is {overlap_seconds}; it is 0 to {MAX_OVERLAP_SECONDS} (30 days)"
        )
    old = _usable_key(session, key_id)
    if expires_at is None and old.expires_at is not None:
        expires_at = datetime.now(UTC) + (old.expires_at - old.created_at)
    new, text = create_key(
        session,
        team=old.team,
        name=old.name,
        scopes={Scope(scope) for scope in old.scopes},
        expires_at=expires_at,
    )
    ends: dict[str, object] = {"revoked_at": database_now()}
    if overlap_seconds > 0:
        end = database_time_in(overlap_seconds)
        sooner = case((ApiKey.expires_at < end, ApiKey.expires_at), else_=end)
        ends = {"expires_at": sooner}
    session.execute(
        update(ApiKey).where(ApiKey.id == key_id).values(replaced_by=new.id, **ends),
        execution_options={"synchronize_session": False},
    )
    session.expire(old)
    return new, text


def _usable_key(session: Session, key_id: str) -> ApiKey:
    """Return a key that is in force, and let nobody else rotate it until the caller's commit.

    Raises:
        NotFound: If there is no such key.
        KeyEnded: If it is not in force, or was replaced.
    """
    found = session.execute(
        select(ApiKey, _usable()).where(ApiKey.id == key_id).with_for_update(),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if found is None:
        raise NotFound("key", key_id)
    key = found[0]
    if key.replaced_by is not None:
        raise KeyEnded(key_id, f"was replaced by {key.replaced_by}; rotate that one")
    if not found[1]:
        raise KeyEnded(key_id, "is revoked or expired; make a new one")
    return key


def authenticate(session: Session, token: str) -> Caller:
    """Return who a key's text belongs to, in time that does not tell whether its prefix exists.

    Raises:
        InvalidKey: If it is malformed, unknown, revoked or expired.
    """
    found = _TOKEN.fullmatch(token)
    prefix, secret = (found[1], found[2]) if found is not None else ("", "")
    # One row comes in any case, empty for an unknown prefix, and the comparison is made in any
    # case: the time says nothing of the prefix.
    row = session.execute(_LOOK_UP, {"prefix": prefix}).one()
    given = hashlib.sha256(secret.encode()).hexdigest()
    matches = hmac.compare_digest(given, row.secret_sha256 or _NO_SECRET)
    if row.id is None or not matches or not row.usable:
        raise InvalidKey("The API key is unknown, revoked or expired.")
    return Caller(
        team=row.team,
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        key_id=row.id,
        requests_per_minute=row.requests_per_minute,
        submissions_per_minute=row.submissions_per_minute,
        use_is_old=bool(row.use_is_old),
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


_ALWAYS: Final = select(literal(1).label("one")).subquery("always")
_LOOK_UP: Final = (
    select(
        ApiKey.id,
        ApiKey.team,
        ApiKey.secret_sha256,
        ApiKey.scopes,
        Team.requests_per_minute,
        Team.submissions_per_minute,
        _usable().label("usable"),
        _use_is_old().label("use_is_old"),
    )
    .select_from(_ALWAYS)
    .outerjoin(ApiKey, ApiKey.prefix == bindparam("prefix"))
    .outerjoin(Team, Team.name == ApiKey.team)
)
