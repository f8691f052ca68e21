"""Keys over the wire: rotated with an overlap, ended within seconds in every process."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from api.app import create_app
from api.services import Services
from store.database import transaction
from store.keys import Scope
from store.models import ApiKey
from store.settings import Settings
from tests.api.conftest import Team


@pytest.fixture
def admin(join: Callable[..., Team]) -> Team:
    return join("ops", Scope.ADMIN)


def make(admin: Team, **fields: Any) -> tuple[dict[str, Any], Team]:
    body = {"name": "ci", "team": "beta", "scopes": ["read"], **fields}
    answer = admin.post("/keys", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json(), Team(admin.client, "beta", answer.json()["key"])


def test_a_rotated_key_and_its_successor_are_both_valid(admin: Team) -> None:
    old, holder = make(admin)
    answer = admin.post(f"/keys/{old['id']}/rotate", json={"overlap_seconds": 3600})
    assert answer.status_code == 201
    new = answer.json()
    assert answer.headers["Location"] == f"/keys/{new['id']}"
    same = ("team", "name", "scopes")
    assert {name: new[name] for name in same} == {name: old[name] for name in same}
    assert new["key"] != old["key"]
    for token in (holder, Team(admin.client, "beta", new["key"])):
        assert token.get("/jobs").status_code == 200
    listed = {key["id"]: key for key in admin.get("/keys").json()["data"]}
    assert listed[old["id"]]["replaced_by"] == new["id"]
    ends = datetime.fromisoformat(listed[old["id"]]["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=59) < ends <= timedelta(minutes=61)
    assert new["key"] not in admin.get("/keys").text
    again = admin.post(f"/keys/{old['id']}/rotate", json={})
    assert (again.status_code, again.json()["code"]) == (409, "key_ended")
    assert new["id"] in again.json()["detail"]


def test_without_an_overlap_the_old_key_is_refused_at_once(admin: Team) -> None:
    old, holder = make(admin)
    assert holder.get("/jobs").status_code == 200
    new = admin.post(f"/keys/{old['id']}/rotate", json={"overlap_seconds": 0}).json()
    assert holder.get("/jobs").status_code == 401
    assert Team(admin.client, "beta", new["key"]).get("/jobs").status_code == 200


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"overlap_seconds": -1}, "/overlap_seconds"),
        ({"overlap_seconds": 30 * 86_400 + 1}, "/overlap_seconds"),
        ({"overlap_seconds": 1.5}, "/overlap_seconds"),
        ({"overlap_seconds": "60"}, "/overlap_seconds"),
        ({"scopes": ["admin"]}, "/scopes"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "/expires_at"),
        ({"expires_at": "2027-01-01T00:00:00"}, "/expires_at"),
        ({"expires_at": "2126-01-01T00:00:00Z"}, "/expires_at"),
        ({"expires_in_days": 0}, "/expires_in_days"),
        ({"expires_in_days": 3651}, "/expires_in_days"),
        ({"expires_in_days": 1, "expires_at": "2027-01-01T00:00:00Z"}, "/expires_at"),
    ],
    ids=str,
)
def test_a_rotation_out_of_bounds_is_refused_with_its_field(
    admin: Team, fields: dict[str, Any], pointer: str
) -> None:
    key, holder = make(admin)
    answer = admin.post(f"/keys/{key['id']}/rotate", json=fields)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].startswith(pointer)
    assert holder.get("/jobs").status_code == 200


def test_a_key_ends_when_it_was_told_to(admin: Team, services: Services) -> None:
    key, holder = make(admin, expires_in_days=1)
    assert holder.get("/jobs").status_code == 200
    ends = datetime.fromisoformat(key["expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=23) < ends <= timedelta(hours=24)
    past = admin.post(
        "/keys", json={"name": "x", "scopes": ["read"], "expires_at": "2020-01-01T00:00:00Z"}
    )
    assert past.json()["errors"][0]["pointer"] == "/expires_at"
    assert "in the future" in past.json()["detail"]
    with transaction(services.engine) as session:
        ended = datetime.now(UTC) - timedelta(seconds=1)
        session.execute(update(ApiKey).where(ApiKey.id == key["id"]).values(expires_at=ended))
    assert refused_after(holder) < 5


def refused_after(team: Team) -> float:
    """Return the seconds until a key is refused; it stays refused."""
    started = time.monotonic()
    while team.get("/jobs").status_code != 401:
        assert time.monotonic() - started < 10
        time.sleep(0.05)
    taken = time.monotonic() - started
    assert team.get("/jobs").status_code == 401
    return taken


@pytest.fixture
def other_process(settings: Settings, client: TestClient) -> Iterator[TestClient]:
    """Another API process's worth of app on the same database."""
    assert client
    with TestClient(create_app(settings)) as found:
        yield found


@pytest.mark.slow
def test_a_revoked_key_is_refused_within_five_seconds_in_every_process(
    admin: Team, other_process: TestClient
) -> None:
    key, here = make(admin)
    there = Team(other_process, here.name, here.token)
    for holder in (here, there):
        assert holder.get("/jobs").status_code == 200
    assert admin.delete(f"/keys/{key['id']}").status_code == 204
    assert here.get("/jobs").status_code == 401
    assert refused_after(there) < 5


@pytest.mark.slow
def test_keys_that_are_rotated_again_and_again_shut_nobody_out(
    admin: Team, other_process: TestClient
) -> None:
    key, _ = make(admin, scopes=["read", "write"])
    everywhere = (admin.client, other_process)
    replaced: list[str] = []
    for number in range(6):
        overlap = 3600 if number % 2 else 0
        body = {"overlap_seconds": overlap}
        new = admin.post(f"/keys/{key['id']}/rotate", json=body).json()
        for client in everywhere:
            # The new one at once, and the old one as long as it was promised.
            assert Team(client, "beta", new["key"]).get("/jobs").status_code == 200
            if overlap:
                assert Team(client, "beta", key["key"]).get("/jobs").status_code == 200
        if not overlap:
            replaced.append(key["key"])
        key = new
    time.sleep(3.1)
    for client in everywhere:
        assert {Team(client, "beta", old).get("/jobs").status_code for old in replaced} == {401}


def test_a_caller_cannot_revoke_or_rotate_without_the_scope(admin: Team) -> None:
    key, holder = make(admin, scopes=["read", "write", "infer"])
    for answer in (
        holder.delete(f"/keys/{key['id']}"),
        holder.post(f"/keys/{key['id']}/rotate", json={}),
        holder.get("/teams"),
        holder.get("/audit"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing")
    assert holder.get("/jobs").status_code == 200


@pytest.mark.parametrize("status", ["revoked", "expired", "unknown"])
def test_a_key_that_is_not_in_force_is_told_nothing_of_why(
    admin: Team, services: Services, status: str
) -> None:
    key, holder = make(admin)
    if status == "unknown":
        holder = Team(
            admin.client, "beta", f"{key['key'][:-1]}{'a' if key['key'][-1] != 'a' else 'b'}"
        )
    else:
        column = "revoked_at" if status == "revoked" else "expires_at"
        with transaction(services.engine) as session:
            past = datetime.now(UTC) - timedelta(days=1)
            session.execute(update(ApiKey).where(ApiKey.id == key["id"]).values({column: past}))
    answer = holder.get("/jobs")
    assert answer.status_code == 401
    assert answer.json()["code"] == "auth_invalid"
    assert answer.json()["detail"] == "The API key is unknown, revoked or expired."
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
