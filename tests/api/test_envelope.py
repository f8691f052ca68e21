"""The headers that every answer has, whatever kind of answer it is."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.services import Services
from store.keys import Scope
from tests.api.conftest import MODEL, Team, app_settings, job_body, new_team, opened

SAFE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
CROSS_ORIGIN = ("Access-Control-Allow-Origin", "Access-Control-Allow-Headers")


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError


def failing(team: Team, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("store.jobs.list_jobs", broken)
    return team.get("/jobs")


def streamed(team: Team, _: pytest.MonkeyPatch) -> Any:
    job = team.job()["id"]
    team.post(f"/jobs/{job}/cancel")
    return team.get(f"/jobs/{job}/events", headers={"Accept": "text/event-stream"})


KINDS: dict[str, tuple[int, Callable[[Team, pytest.MonkeyPatch], Any]]] = {
    "ok": (200, lambda team, _: team.get("/jobs")),
    "made": (201, lambda team, _: team.upload(b'{"messages":[{"role":"user","content":"a"},'
                                              b'{"role":"assistant","content":"b"}]}\n')),
    "stream": (200, streamed),
    "unauthorized": (401, lambda team, _: team.client.get("/jobs")),
    "forbidden": (403, lambda team, _: team.get("/keys")),
    "not found": (404, lambda team, _: team.get("/jobs/none")),
    "unknown path": (404, lambda team, _: team.get("/no/such/path")),
    "slash": (404, lambda team, _: team.get("/jobs/")),
    "method": (405, lambda team, _: team.request("PUT", "/jobs")),
    "media type": (415, lambda team, _: team.send("/jobs", b"a=b", "text/plain")),
    "invalid": (422, lambda team, _: team.post("/jobs", json={})),
    "headers": (431, lambda team, _: team.get("/jobs", headers={"X-Long": "x" * 20_000})),
    "broken": (500, failing),
    "no worker": (503, lambda team, _: team.post("/infer", json={"model": MODEL, "prompt": "x"})),
    "facade": (200, lambda team, _: team.get("/v1/models")),
    "facade not found": (404, lambda team, _: team.get("/v1/files/none")),
    "facade unknown path": (404, lambda team, _: team.get("/v1/nothing")),
    "facade invalid": (400, lambda team, _: team.post("/v1/fine_tuning/jobs", json={})),
    "document": (200, lambda team, _: team.client.get("/openapi.json")),
    "public": (200, lambda team, _: team.client.get("/metrics")),
    "options": (405, lambda team, _: team.request("OPTIONS", "/jobs")),
}  # fmt: skip


@pytest.mark.parametrize(("status", "ask"), KINDS.values(), ids=KINDS)
def test_every_kind_of_answer_has_the_safe_headers(
    team: Team,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    ask: Callable[[Team, pytest.MonkeyPatch], Any],
) -> None:
    answer = ask(team, monkeypatch)
    assert answer.status_code == status, answer.text
    assert {name: answer.headers.get(name) for name in SAFE} == SAFE
    assert answer.headers["X-Request-Id"].startswith("req_")
    assert not [name for name in CROSS_ORIGIN if name in answer.headers]
    # The proxy that ends TLS says this one; over plain HTTP it would mean nothing.
    assert "Strict-Transport-Security" not in answer.headers
    assert "Server" not in answer.headers


@pytest.mark.parametrize("path", ["/jobs", "/v1/chat/completions", "/datasets", "/nothing"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:8000"])
def test_no_other_origin_is_allowed(team: Team, path: str, origin: str) -> None:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    preflight = team.client.options(
        path, headers={**asked, "Access-Control-Request-Headers": "authorization,content-type"}
    )
    assert preflight.status_code in {404, 405}
    simple = team.get(path, headers=asked)
    for answer in (preflight, simple):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


FORMS = ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", "")


@pytest.mark.parametrize("content_type", FORMS)
@pytest.mark.parametrize(
    "path",
    ["/jobs", "/jobs/plan", "/infer", "/models", "/keys", "/keys/key_1/rotate",
     "/v1/chat/completions", "/v1/fine_tuning/jobs"],
)  # fmt: skip
def test_what_a_web_pages_form_can_send_is_refused_where_json_is_read(
    client: TestClient, path: str, content_type: str
) -> None:
    admin = new_team(client, "ops", *Scope)
    body = b'{"model": "x"}'
    assert admin.send(path, body, content_type).status_code == 415
    # A page cannot add the key either; without it the type is not even looked at.
    plain = client.post(path, content=body, headers={"Content-Type": content_type})
    assert plain.status_code == 401


@pytest.fixture
def guarded(tmp_path: Path, sqlite_url: str) -> Iterator[TestClient]:
    settings = app_settings(tmp_path / "home", sqlite_url)
    named = settings.model_copy(update={"allowed_hosts": ["127.0.0.1", "*.grit.example"]})
    with opened(named) as app, TestClient(app, raise_server_exceptions=False) as made:
        yield made


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("api.grit.example", 200),
        ("API.GRIT.EXAMPLE", 200),
        ("evil.example", 400),
        ("grit.example.evil.example", 400),
        ("127.0.0.1.evil.example:8000", 400),
        ("", 400),
    ],
)
def test_a_name_that_leads_here_from_elsewhere_is_not_answered(
    guarded: TestClient, host: str, status: int
) -> None:
    team = new_team(guarded, "alpha")
    answer = team.get("/jobs", headers={"Host": host})
    assert answer.status_code == status
    assert {name: answer.headers.get(name) for name in SAFE} == SAFE


def test_a_job_is_not_made_by_a_form(team: Team, services: Services) -> None:
    dataset = team.dataset()
    assert services
    answer = team.post("/jobs", data=job_body(dataset))
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert team.get("/jobs").json()["data"] == []
