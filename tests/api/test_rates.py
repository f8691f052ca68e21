"""Rates over the wire: two apps share one limit, and each counts alone while the broker is away."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import update
from starlette.testclient import TestClient

from api.app import create_app
from store.database import transaction
from store.keys import Scope
from store.models import Team as TeamRow
from store.rates import Buckets
from store.settings import Settings
from tests.api.conftest import Team, app_settings, job_body, new_team, opened


def limited(settings: Settings, **fields: Any) -> Settings:
    return settings.model_copy(update=fields)


@pytest.fixture
def shared(sqlite_url: str, valkey: str, queue_prefix: str, tmp_path: Path) -> Settings:
    settings = app_settings(tmp_path / "home", sqlite_url)
    return limited(
        settings,
        broker_url=valkey,
        queue_prefix=queue_prefix,
        rate_requests_per_minute=30,
        rate_submissions_per_minute=4,
    )


@pytest.fixture
def two(shared: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Team, Team]]:
    """One key, at two API processes' worth of apps."""
    # The machine that tests may pause for longer than the service would wait.
    monkeypatch.setitem(Buckets.__init__.__kwdefaults__, "patience_seconds", 5.0)
    with opened(shared) as one, TestClient(one) as first:
        team = new_team(first, "alpha")
        with TestClient(create_app(shared)) as second:
            yield team, Team(second, team.name, team.token)


def statuses(teams: tuple[Team, ...], count: int, path: str = "/jobs") -> list[int]:
    return [teams[number % len(teams)].get(path).status_code for number in range(count)]


def test_two_processes_share_a_keys_rate(two: tuple[Team, Team]) -> None:
    found = statuses(two, 60)
    # Half a token comes back in a second, and the bucket held 30.
    assert 30 <= found.count(200) <= 33
    assert set(found) == {200, 429}
    refused = two[1].get("/jobs")
    assert refused.json()["code"] == "rate_limited"
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert 1 <= int(refused.headers["Retry-After"]) <= 2
    limits = {name: refused.headers[f"RateLimit-{name}"] for name in ("Limit", "Remaining")}
    assert limits == {"Limit": "30", "Remaining": "0"}
    assert refused.headers["RateLimit-Reset"] == refused.headers["Retry-After"]
    assert "at most 30 requests a minute" in refused.json()["detail"]


def test_the_facade_says_it_in_openais_words(two: tuple[Team, Team]) -> None:
    statuses(two, 40)
    refused = two[0].get("/v1/models")
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert refused.headers["Retry-After"]
    assert refused.headers["RateLimit-Limit"] == "30"


def test_submissions_have_a_rate_of_their_own(two: tuple[Team, Team]) -> None:
    codes = [two[number % 2].post("/jobs", json={}).status_code for number in range(7)]
    assert codes == [422] * 4 + [429] * 3
    assert two[0].get("/jobs").status_code == 200
    assert two[0].post("/jobs/plan", json={}).status_code == 422  # it creates nothing
    # A caller who may not submit may still clean up.
    assert two[0].delete("/datasets/ds_unknown").status_code == 404


def test_another_key_of_the_team_has_its_own_bucket_until_the_teams_is_empty(
    shared: Settings,
) -> None:
    with (
        opened(limited(shared, rate_team_requests_per_minute=40)) as app,
        TestClient(app) as client,
    ):
        teams = tuple(new_team(client, name) for name in ("alpha", "alpha", "beta"))
        assert statuses(teams[:1], 35).count(200) in range(30, 33)
        assert statuses(teams[1:2], 30).count(200) in range(7, 13)
        assert "all keys together" in teams[1].get("/jobs").json()["detail"]
        assert statuses(teams[2:], 20) == [200] * 20


def test_a_teams_own_rate_goes_before_the_deployments(
    shared: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.auth._CACHE_SECONDS", 0.0)
    with opened(shared) as app, TestClient(app) as client:
        team = new_team(client, "alpha")
        with transaction(app.state.services.engine) as session:
            session.execute(update(TeamRow).values(requests_per_minute=3))
        assert statuses((team,), 6) == [200] * 3 + [429] * 3
        with transaction(app.state.services.engine) as session:
            session.execute(update(TeamRow).values(requests_per_minute=6000))
        time.sleep(0.3)  # a hundred tokens a second come now
        assert statuses((team,), 20) == [200] * 20


def test_zero_is_no_limit_and_public_routes_have_none(shared: Settings) -> None:
    off = {name: 0 for name in Settings.model_fields if name.startswith("rate_")}
    assert len(off) == 4
    with opened(limited(shared, **off)) as app, TestClient(app) as client:
        assert set(statuses((new_team(client, "alpha"),), 50)) == {200}
    with opened(shared) as app, TestClient(app) as client:
        team = new_team(client, "beta")
        statuses((team,), 40)
        assert set(statuses((team,), 40, "/healthz")) == {200}


def test_a_key_without_the_scope_is_counted_too(shared: Settings) -> None:
    with opened(shared) as app, TestClient(app) as client:
        weak = new_team(client, "alpha", Scope.INFER)
        assert set(statuses((weak,), 30)) == {403}
        assert weak.get("/jobs").status_code == 429


@pytest.fixture
def silent_broker() -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


@pytest.mark.parametrize("broker", ["away", "silent"])
def test_without_a_broker_each_process_counts_by_itself_and_nobody_waits(
    shared: Settings, broker: str, silent_broker: str, capfd: pytest.CaptureFixture[str]
) -> None:
    url = silent_broker if broker == "silent" else "redis://127.0.0.1:1/0"
    alone = limited(shared, broker_url=url)
    with opened(alone) as app, TestClient(app) as client:
        team = new_team(client, "alpha")
        assert team.get("/jobs").status_code == 200  # pays for the imports, and for the silence
        started = time.monotonic()
        found = statuses((team,), 29)
        assert time.monotonic() - started < 3
        assert set(found) == {200}
        assert 429 in statuses((team,), 10)
    assert capfd.readouterr().err.count("rates_counted_alone") == 1


def test_jobs_are_created_at_the_default_rates(team: Team, app: FastAPI) -> None:
    assert app.state.services.settings.rate_submissions_per_minute >= 60
    dataset = team.dataset()
    made = [team.post("/jobs", json=job_body(dataset)).status_code for _ in range(20)]
    assert made == [201] * 20
