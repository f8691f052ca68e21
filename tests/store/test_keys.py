"""API keys on both databases."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, update

from store import keys
from store.database import transaction
from store.database_time import database_time_in
from store.errors import InvalidKey, NotFound
from store.keys import Caller, Scope
from store.models import ApiKey


def _create(engine: Engine, *, expires_at: datetime | None = None) -> tuple[ApiKey, str]:
    with transaction(engine) as session:
        return keys.create_key(
            session,
            team="ml",
            name="first",
            scopes={Scope.READ, Scope.INFER},
            expires_at=expires_at,
        )


def _authenticate(engine: Engine, token: str) -> Caller:
    with transaction(engine, read_only=True) as session:
        return keys.authenticate(session, token)


def test_a_key_tells_its_team_and_scopes(engine: Engine) -> None:
    key, token = _create(engine)
    caller = _authenticate(engine, token)
    assert (caller.team, caller.key_id) == ("ml", key.id)
    assert caller.scopes == {Scope.READ, Scope.INFER}


def test_only_the_hash_of_a_secret_is_stored(engine: Engine) -> None:
    key, token = _create(engine)
    secret = token.split("_", 2)[2]
    assert len(secret) == 43  # 256 bits
    stored = [str(value) for value in vars(key).values()]
    assert not any(secret in value for value in stored)
    assert key.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda _: "", id="empty"),
        pytest.param(lambda token: token[:-1], id="shorter"),
        pytest.param(lambda token: token + "x", id="longer"),
        pytest.param(lambda token: token[:-1] + ("a" if token[-1] != "a" else "b"), id="secret"),
        pytest.param(lambda token: "grit_000000000000_" + token.split("_", 2)[2], id="prefix"),
        pytest.param(lambda token: token.upper(), id="case"),
        pytest.param(lambda token: f" {token}", id="space"),
        pytest.param(lambda token: f"{token}\n", id="line"),
        pytest.param(lambda _: "grit_é_é", id="letters"),
        pytest.param(lambda _: "x" * 100_000, id="huge"),
        pytest.param(lambda _: "\0", id="nul"),
    ],
)
def test_anything_but_the_key_itself_is_refused(
    engine: Engine, change: Callable[[str], str]
) -> None:
    _, token = _create(engine)
    with pytest.raises(InvalidKey):
        _authenticate(engine, change(token))


def test_a_revoked_or_expired_key_is_refused(engine: Engine) -> None:
    key, token = _create(engine)
    _, expired = _create(engine, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    _, valid = _create(engine, expires_at=datetime.now(UTC) + timedelta(minutes=1))
    with transaction(engine) as session:
        first = keys.revoke_key(session, key.id, team="ml").revoked_at
        assert keys.revoke_key(session, key.id).revoked_at == first
    for refused in (token, expired):
        with pytest.raises(InvalidKey):
            _authenticate(engine, refused)
    assert _authenticate(engine, valid).team == "ml"


def test_another_teams_key_cannot_be_revoked(engine: Engine) -> None:
    key, token = _create(engine)
    with pytest.raises(NotFound), transaction(engine) as session:
        keys.revoke_key(session, key.id, team="other")
    assert _authenticate(engine, token).team == "ml"


def test_a_use_is_noted_at_most_once_a_minute(engine: Engine) -> None:
    _, token = _create(engine)
    caller = _authenticate(engine, token)
    assert caller.use_is_old
    with transaction(engine) as session:
        keys.record_use(session, caller)
    assert not _authenticate(engine, token).use_is_old
    with transaction(engine) as session:
        session.execute(update(ApiKey).values(last_used_at=database_time_in(-61)))
    assert _authenticate(engine, token).use_is_old


def test_keys_are_listed_by_team(engine: Engine) -> None:
    key, _ = _create(engine)
    with transaction(engine) as session:
        other, _ = keys.create_key(session, team="other", name="x", scopes=["admin"])
        assert [row.id for row in keys.list_keys(session, team="ml")] == [key.id]
        assert [row.id for row in keys.list_keys(session)] == [key.id, other.id]


@pytest.mark.parametrize("name", ["", "A", "-x", "a b", "x" * 65, "é", "a\n"])
def test_a_teams_name_is_a_plain_word(engine: Engine, name: str) -> None:
    with transaction(engine) as session, pytest.raises(ValueError, match="team"):
        keys.ensure_team(session, name)


def test_a_key_needs_a_known_scope(engine: Engine) -> None:
    for scopes in ([], ["root"]):
        with transaction(engine) as session, pytest.raises(ValueError, match=r"scope|Scope"):
            keys.create_key(session, team="ml", name="x", scopes=scopes)
