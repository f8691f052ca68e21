"""Teams over the wire: an administrator sets limits, a team sees its own."""

from collections.abc import Callable
from typing import Any

import pytest

from store.database import transaction
from store.keys import Scope
from store.teams import LEAST, get_team, set_limits
from tests.api.conftest import Team, job_body


@pytest.fixture
def api_database_url(database_url: str) -> str:
    """Both databases: usage is counted in SQL of this part alone."""
    return database_url


@pytest.fixture
def admin(join: Callable[..., Team]) -> Team:
    return join("ops", Scope.ADMIN)


def test_a_team_sees_its_own_limits_and_usage(team: Team) -> None:
    before = team.get("/team").json()
    assert before["name"] == "alpha"
    assert before["usage"] == {"open_jobs": 0, "running_jobs": 0, "stored_bytes": 0}
    assert before["own_limits"] == dict.fromkeys(LEAST)
    assert before["limits"] == {
        "max_open_jobs": 1000,
        "max_running_jobs": None,
        "max_stored_bytes": None,
        "requests_per_minute": 12_000,
        "submissions_per_minute": 1200,
    }
    dataset = team.dataset()
    team.job(dataset=dataset)
    size = team.get(f"/datasets/{dataset}").json()["size_bytes"]
    usage = team.get("/team").json()["usage"]
    assert usage == {"open_jobs": 1, "running_jobs": 0, "stored_bytes": size}


def test_an_administrator_sees_every_team_and_sets_its_limits(team: Team, admin: Team) -> None:
    dataset = team.dataset()
    listed = {each["name"]: each for each in admin.get("/teams").json()["data"]}
    assert set(listed) == {"alpha", "ops"}
    assert listed["alpha"] == admin.get("/teams/alpha").json() == team.get("/team").json()
    set_to = {"max_open_jobs": 1, "requests_per_minute": 500}
    changed = admin.request("PATCH", "/teams/alpha", json=set_to)
    assert changed.status_code == 200
    assert {name: changed.json()["own_limits"][name] for name in set_to} == set_to
    assert {name: changed.json()["limits"][name] for name in set_to} == set_to
    assert changed.json()["own_limits"]["max_stored_bytes"] is None
    assert team.post("/jobs", json=job_body(dataset)).status_code == 201
    refused = team.post("/jobs", json=job_body(dataset))
    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    # What is left out stays, and null gives the deployment's limit again.
    again = admin.request("PATCH", "/teams/alpha", json={"max_open_jobs": None}).json()
    assert again["own_limits"] == {**dict.fromkeys(LEAST), "requests_per_minute": 500}
    assert team.post("/jobs", json=job_body(dataset)).status_code == 201
    assert admin.request("PATCH", "/teams/alpha", json={}).json() == team.get("/team").json()


def test_none_at_all_may_be_allowed(team: Team, admin: Team) -> None:
    dataset = team.dataset()
    nothing = {"max_open_jobs": 0, "max_stored_bytes": 0}
    assert admin.request("PATCH", "/teams/alpha", json=nothing).status_code == 200
    for answer in (team.post("/jobs", json=job_body(dataset)), team.upload(b"{}")):
        assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
    assert team.get(f"/datasets/{dataset}").status_code == 200


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"max_open_jobs": -1}, "/max_open_jobs"),
        ({"max_open_jobs": 1.5}, "/max_open_jobs"),
        ({"max_open_jobs": "1"}, "/max_open_jobs"),
        ({"max_open_jobs": True}, "/max_open_jobs"),
        ({"max_stored_bytes": 10**16}, "/max_stored_bytes"),
        ({"requests_per_minute": 0}, "/requests_per_minute"),
        ({"name": "other"}, "/name"),
        ({"created_at": None}, "/created_at"),
        ({"last_claimed_at": None}, "/last_claimed_at"),
    ],
    ids=str,
)
def test_a_limit_out_of_bounds_is_refused_with_its_field(
    team: Team, admin: Team, fields: dict[str, Any], pointer: str
) -> None:
    answer = admin.request("PATCH", "/teams/alpha", json=fields)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].startswith(pointer)
    assert team.get("/team").json()["own_limits"] == dict.fromkeys(LEAST)


def test_a_team_that_is_not_there_is_not_made(admin: Team) -> None:
    for method in ("GET", "PATCH"):
        answer = admin.request(method, "/teams/nobody", json={})
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert [each["name"] for each in admin.get("/teams").json()["data"]] == ["ops"]


@pytest.mark.parametrize("limits", [{"max_jobs": 1}, {"max_open_jobs": -1}])
def test_the_store_refuses_what_no_team_can_have(
    team: Team, services: Any, limits: dict[str, int]
) -> None:
    with transaction(services.engine) as session:
        with pytest.raises(ValueError, match=next(iter(limits))):
            set_limits(session, team.name, limits)
        assert get_team(session, team.name).max_open_jobs is None


def test_the_audit_is_read_in_pages_by_team_and_time(team: Team, admin: Team) -> None:
    for number in range(3):
        team.delete(f"/jobs/job_{number}")
    admin.request("PATCH", "/teams/alpha", json={"max_open_jobs": 3})
    assert admin.client.app.state.trail.flush()  # type: ignore[attr-defined] # it is our app
    page = admin.get("/audit?limit=2").json()
    assert [(row["action"], row["team"]) for row in page["data"]] == [
        ("PATCH /teams/{name}", "ops"),
        ("DELETE /jobs/{job_id}", "alpha"),
    ]
    assert page["data"][0]["object_id"] == "alpha"
    rest = admin.get("/audit", params={"cursor": page["next"]}).json()
    assert [row["object_id"] for row in rest["data"]] == ["job_1", "job_0"]
    assert rest["next"] is None
    mine = admin.get("/audit?team=alpha").json()["data"]
    assert {row["team"] for row in mine} == {"alpha"}
    assert len(admin.get("/audit", params={"since": mine[0]["at"]}).json()["data"]) == 2
    for wrong in ("since=2026-01-01T00:00:00", "since=1", "cursor=x", "limit=0", "team=A%20B"):
        assert admin.get(f"/audit?{wrong}").status_code == 422
    assert team.get("/audit").status_code == 403
