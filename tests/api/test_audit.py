"""Every change that was admitted is one row of the audit, whatever came of it."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from sqlalchemy import text
from starlette.testclient import TestClient

from api.app import ROUTES
from api.auth import access_of
from store import audit
from store.database import transaction
from store.keys import Scope
from store.models import AuditRow
from tests.api.conftest import MODEL, Team, app_settings, job_body, new_team, opened

CHANGING = [
    (method, route.path)
    for module in ROUTES
    for route in module.router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
    if method != "GET"
]
CHANGES_NOTHING = {("POST", "/jobs/plan"), ("POST", "/infer"), ("POST", "/v1/chat/completions")}
"""They look, or answer; nothing of them stays."""


@pytest.fixture(scope="module")
def client(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("audit")
    shutil.copy(sqlite_template, folder / "grit.db")
    settings = app_settings(folder / "home", f"sqlite:///{folder / 'grit.db'}")
    with opened(settings) as made, TestClient(made, raise_server_exceptions=False) as found:
        yield found


@pytest.fixture(scope="module")
def app(client: TestClient) -> FastAPI:
    found = client.app
    assert isinstance(found, FastAPI)
    return found


@pytest.fixture(scope="module")
def join(client: TestClient) -> Callable[..., Team]:
    return lambda name, *scopes: new_team(client, name, *scopes)


def rows_of(app: FastAPI, team: str) -> list[AuditRow]:
    """The team's rows, the oldest first."""
    assert app.state.trail.flush(timeout_seconds=20)
    with transaction(app.state.services.engine, read_only=True) as session:
        return list(reversed(audit.read_audit(session, team=team, limit=1000).rows))


def filled(path: str) -> str:
    """A route's path with ids that nobody has."""
    return "/".join("none" if step.startswith("{") else step for step in path.split("/"))


@pytest.mark.parametrize(("method", "path"), CHANGING, ids=str)
def test_a_route_that_changes_something_writes_exactly_one_row(
    app: FastAPI, join: Callable[..., Team], method: str, path: str
) -> None:
    name = f"t{CHANGING.index((method, path))}"
    caller = join(name, *Scope)
    answer = caller.request(method, filled(path), json={}, headers={"X-Request-Id": "of-this-one"})
    found = rows_of(app, name)
    if (method, path) in CHANGES_NOTHING:
        assert found == []
        return
    row = found[0]
    assert len(found) == 1
    assert row.action == f"{method} {path}"
    assert row.status == answer.status_code
    assert row.request_id == "of-this-one"
    assert row.client_address == "testclient"
    assert row.key_id.startswith("key_")
    if "{" in path:
        assert row.object_id.startswith("none")


def test_the_routes_that_write_no_row_are_the_known_ones() -> None:
    scopes = {
        (method, route.path): access_of(route.endpoint)
        for module in ROUTES
        for route in module.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    silent = {each for each in CHANGING if scopes[each] not in {Scope.WRITE, Scope.ADMIN}}
    assert silent == CHANGES_NOTHING


def test_a_row_names_what_was_made(app: FastAPI, join: Callable[..., Team]) -> None:
    caller = join("maker", *Scope)
    dataset = caller.dataset()
    job = caller.job(dataset=dataset)["id"]
    file = caller.post("/v1/files", files={"file": ("r.jsonl", b"")}, data={"purpose": "fine-tune"})
    assert file.status_code == 400
    tuning = caller.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": dataset})
    assert tuning.status_code == 200, tuning.text
    caller.post(f"/jobs/{job}/cancel")
    caller.get(f"/jobs/{job}")
    found = [(row.action, row.object_id, row.status) for row in rows_of(app, "maker")]
    assert found == [
        ("POST /datasets", dataset, 201),
        ("POST /jobs", job, 201),
        ("POST /v1/files", None, 400),
        ("POST /v1/fine_tuning/jobs", tuning.json()["id"], 200),
        ("POST /jobs/{job_id}/cancel", job, 200),
    ]


def test_a_refused_scope_is_written_and_an_unknown_key_is_not(
    app: FastAPI, join: Callable[..., Team]
) -> None:
    weak = join("weak", Scope.READ)
    assert weak.get("/keys").status_code == 403
    assert weak.post("/jobs", json={}).status_code == 403
    stranger = Team(weak.client, "weak", f"grit_{'0' * 12}_{'x' * 43}")
    assert stranger.post("/jobs", json={}).status_code == 401
    found = [(row.action, row.status) for row in rows_of(app, "weak")]
    assert found == [("GET /keys", 403), ("POST /jobs", 403)]


def test_odd_ids_and_addresses_do_not_break_a_row(app: FastAPI, join: Callable[..., Team]) -> None:
    caller = join("odd", *Scope)
    for name in ("a%00b", "x" * 3000, "%ED%A0%80", "a%0Ab"):
        assert caller.delete(f"/jobs/{name}").status_code == 404
    found = rows_of(app, "odd")
    assert len(found) == 4
    assert all(row.object_id.isprintable() and len(row.object_id) <= 200 for row in found)


def test_the_chain_of_all_these_rows_is_whole(app: FastAPI) -> None:
    assert app.state.trail.flush(timeout_seconds=20)
    with transaction(app.state.services.engine, read_only=True) as session:
        assert audit.verify(session).num_rows > len(CHANGING) - len(CHANGES_NOTHING)


def test_many_at_once_write_one_row_each(app: FastAPI, join: Callable[..., Team]) -> None:
    caller = join("many")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: caller.delete(f"/jobs/job_{number}"), range(64)))
    found = [row.object_id for row in rows_of(app, "many")]
    assert sorted(found) == sorted(f"job_{number}" for number in range(64))


@pytest.fixture
def own(sqlite_url: str, tmp_path: Path) -> Iterator[TestClient]:
    """An app of the test's own, whose tables it may break."""
    with (
        opened(app_settings(tmp_path / "home", sqlite_url)) as made,
        TestClient(made, raise_server_exceptions=False) as found,
    ):
        yield found


def test_a_row_that_cannot_be_written_is_told_whole_and_the_request_succeeds(
    own: TestClient, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.audit._CLOSE_SECONDS", 0.5)
    monkeypatch.setattr("api.audit.AuditTrail.flush.__kwdefaults__", {"timeout_seconds": 0.5})
    team = new_team(own, "alpha")
    app: Any = own.app
    engine = app.state.services.engine
    dataset = team.dataset()
    assert app.state.trail.flush()
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE audit RENAME TO audit_away"))
    made = team.post("/jobs", json=job_body(dataset))
    assert made.status_code == 201
    app.state.trail.close()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line[:1] == "{"]
    lost = [line for line in lines if line["event"] == "audit_lost"]
    assert [line["object_id"] for line in lost] == [made.json()["id"]]
    assert (lost[0]["team"], lost[0]["action"]) == ("alpha", "POST /jobs")
    assert any(line["event"] == "audit_waits" for line in lines)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE audit_away RENAME TO audit"))


def test_a_row_waits_for_a_database_that_comes_back(own: TestClient) -> None:
    team = new_team(own, "alpha")
    app: Any = own.app
    with app.state.services.engine.begin() as connection:
        connection.execute(text("ALTER TABLE audit RENAME TO audit_away"))
    assert team.delete("/jobs/job_none").status_code == 404
    time.sleep(0.2)
    with app.state.services.engine.begin() as connection:
        connection.execute(text("ALTER TABLE audit_away RENAME TO audit"))
    found = rows_of(app, "alpha")
    assert [row.object_id for row in found] == ["job_none"]
