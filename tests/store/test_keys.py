"""API keys on both databases."""

import hashlib
import re
import statistics
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from store import keys
from store.database import run_in_transaction, transaction
from store.database_time import database_time_in
from store.errors import InvalidKey, KeyEnded, NotFound
from store.keys import Caller, Scope
from store.models import ApiKey, Team


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


def test_a_rotated_key_has_a_successor_and_goes_on_for_the_overlap(engine: Engine) -> None:
    key, token = _create(engine)
    with transaction(engine) as session:
        successor, text = keys.rotate_key(session, key.id, overlap_seconds=60)
    for valid, key_id in ((token, key.id), (text, successor.id)):
        caller = _authenticate(engine, valid)
        assert (caller.key_id, caller.team) == (key_id, "ml")
        assert caller.scopes == {Scope.READ, Scope.INFER}
    with transaction(engine, read_only=True) as session:
        old, new = keys.list_keys(session)
    assert (old.replaced_by, new.replaced_by, new.expires_at) == (new.id, None, None)
    assert old.revoked_at is None
    assert old.expires_at is not None
    left = (old.expires_at - datetime.now(UTC)).total_seconds()
    assert 40 < left <= 61
    with transaction(engine) as session:
        session.execute(update(ApiKey).where(ApiKey.id == key.id).values(expires_at=old.created_at))
    with pytest.raises(InvalidKey):
        _authenticate(engine, token)
    _authenticate(engine, text)


def test_without_an_overlap_the_old_key_ends_at_once(engine: Engine) -> None:
    key, token = _create(engine)
    with transaction(engine) as session:
        _, text = keys.rotate_key(session, key.id, overlap_seconds=0)
    with pytest.raises(InvalidKey):
        _authenticate(engine, token)
    _authenticate(engine, text)


def test_an_overlap_does_not_lengthen_a_keys_life(engine: Engine) -> None:
    end = datetime.now(UTC) + timedelta(minutes=1)
    key, _ = _create(engine, expires_at=end)
    with transaction(engine) as session:
        new, _ = keys.rotate_key(session, key.id)
        # It lives as long as the old one was to.
        assert new.expires_at is not None
        assert abs(new.expires_at - end) < timedelta(seconds=20)
    with transaction(engine, read_only=True) as session:
        assert session.get_one(ApiKey, key.id).expires_at == end


def test_a_key_is_rotated_once_and_only_while_it_is_in_force(engine: Engine) -> None:
    key, _ = _create(engine)
    _, expired_token = _create(engine, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    with transaction(engine) as session:
        new, _ = keys.rotate_key(session, key.id)
        for key_id, words in (
            (key.id, f"replaced by {new.id}"),
            (_id_of(expired_token, session), "expired"),
        ):
            with pytest.raises(KeyEnded, match=words):
                keys.rotate_key(session, key_id)
        with pytest.raises(NotFound):
            keys.rotate_key(session, "key_unknown")
        for overlap in (-1, keys.MAX_OVERLAP_SECONDS + 1, float("nan")):
            with pytest.raises(ValueError, match="overlap_seconds"):
                keys.rotate_key(session, new.id, overlap_seconds=overlap)


def _id_of(token: str, session: Session) -> str:
    return session.scalars(select(ApiKey.id).where(ApiKey.prefix == token.split("_")[1])).one()


def test_rotations_at_once_make_one_successor(engine: Engine) -> None:
    key, _ = _create(engine)
    ended: list[KeyEnded] = []

    def rotate() -> None:
        try:
            run_in_transaction(engine, lambda session: keys.rotate_key(session, key.id))
        except KeyEnded as error:
            ended.append(error)

    threads = [threading.Thread(target=rotate) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 5
    with transaction(engine, read_only=True) as session:
        assert len(keys.list_keys(session)) == 2


def test_an_expiry_is_said_once_and_lies_ahead_within_bounds() -> None:
    now = datetime.now(UTC)
    assert keys.expiry_of(expires_at=None, expires_in_days=None) is None
    found = keys.expiry_of(expires_at=None, expires_in_days=0.5)
    assert found is not None
    assert abs(found - now - timedelta(hours=12)) < timedelta(seconds=20)
    ahead = now + timedelta(days=1)
    assert keys.expiry_of(expires_at=ahead, expires_in_days=None) == ahead
    for at, days in (
        (ahead, 1.0),
        (now - timedelta(seconds=1), None),
        (now + timedelta(days=3651), None),
        (ahead.replace(tzinfo=None), None),
        (None, 0.0),
        (None, -1.0),
        (None, 3651.0),
        (None, float("nan")),
        (None, float("inf")),
    ):
        with pytest.raises(ValueError, match="expires"):
            keys.expiry_of(expires_at=at, expires_in_days=days)


def test_a_caller_brings_its_teams_own_rates(engine: Engine) -> None:
    _, token = _create(engine)
    assert _authenticate(engine, token).requests_per_minute is None
    with transaction(engine) as session:
        session.execute(update(Team).values(requests_per_minute=7, submissions_per_minute=3))
    caller = _authenticate(engine, token)
    assert (caller.requests_per_minute, caller.submissions_per_minute) == (7, 3)


def test_the_time_of_a_refusal_does_not_tell_whether_a_prefix_is_known(
    sqlite_engine: Engine,
) -> None:
    _, token = _create(sqlite_engine)
    secret = "x" * 43
    asked = {"known": f"{token[:17]}_{secret}", "unknown": f"grit_{'0' * 12}_{secret}"}
    times: dict[str, list[float]] = {name: [] for name in asked}
    for trial in range(600):
        # In turns, so that what else the machine does weighs on both.
        for name in sorted(asked, reverse=bool(trial % 2)):
            started = time.perf_counter()
            with pytest.raises(InvalidKey, match="unknown, revoked or expired"):
                _authenticate(sqlite_engine, asked[name])
            times[name].append(time.perf_counter() - started)
    known, unknown = (statistics.median(times[name]) for name in asked)
    assert abs(known - unknown) < 0.2 * unknown


def test_a_secret_scanner_finds_every_key(engine: Engine) -> None:
    pattern = re.compile(r"\bgrit_[0-9a-f]{12}_[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])")
    with transaction(engine) as session:
        tokens = [
            keys.create_key(session, team="ml", name=str(number), scopes={Scope.READ})[1]
            for number in range(200)
        ]
    assert pattern.findall(" ".join(tokens)) == tokens
    assert len(set(tokens)) == 200
