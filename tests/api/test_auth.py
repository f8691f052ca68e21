"""Who is let in: on every route, with every kind of Authorization header."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from api.app import ROUTES
from api.auth import PUBLIC, access_of
from store.keys import Scope
from tests.api.conftest import Team, app_settings, new_team, opened

ALL = [
    (method, route.path, access_of(route.endpoint))
    for module in ROUTES
    for route in module.router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
]
GUARDED = [(method, path) for method, path, access in ALL if access != PUBLIC]


@pytest.fixture(scope="module")
def client(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("auth")
    (folder / "grit.db").write_bytes(sqlite_template.read_bytes())
    settings = app_settings(folder / "home", f"sqlite:///{folder / 'grit.db'}")
    with opened(settings) as app, TestClient(app, raise_server_exceptions=False) as made:
        yield made


@pytest.fixture(scope="module")
def join(client: TestClient) -> Callable[..., Team]:
    return lambda name, *scopes: new_team(client, name, *scopes)


@pytest.mark.parametrize(("method", "path"), GUARDED, ids=str)
def test_without_a_key_every_route_but_the_public_ones_says_so_and_no_more(
    client: TestClient, method: str, path: str
) -> None:
    answers = [
        client.request(method, path, headers=headers, content=b"not even JSON")
        for headers in ({}, {"Authorization": "Basic dXNlcjpwYXNz"}, {"Cookie": "key=grit_1"})
    ]
    for answer in answers:
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="grit"'
        assert code_of(answer) in {"auth_missing", "invalid_api_key"}


@pytest.mark.parametrize("header", ["?key=", "?api_key=", "?access_token="])
def test_a_key_in_the_address_is_not_read(join: Callable[..., Team], header: str) -> None:
    team = join("alpha")
    assert team.client.get(f"/jobs{header}{team.token}").status_code == 401


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ([""], "auth_missing"),
        (["Bearer"], "auth_missing"),
        (["Bearer "], "auth_missing"),
        (["Token {token}"], "auth_missing"),
        (["{token}"], "auth_missing"),
        (["Bearer {token}", "Bearer {token}"], "auth_missing"),
        (["Bearer {token} extra"], "auth_invalid"),
        (["Bearer {token}x"], "auth_invalid"),
        (["Bearer grit_"], "auth_invalid"),
        (["Bearer " + "x" * 8000], "auth_invalid"),
        (["Bearer \xff\xfe"], "auth_invalid"),
        (["Bearer ' OR 1=1 --"], "auth_invalid"),
    ],
    ids=str,
)
def test_a_header_that_is_no_key_of_ours_is_refused(
    join: Callable[..., Team], values: list[str], code: str
) -> None:
    team = join("alpha")
    headers = [
        (b"Authorization", value.replace("{token}", team.token).encode("latin-1"))
        for value in values
    ]
    answer = team.client.get("/jobs", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, code)
    assert answer.headers["WWW-Authenticate"]


def test_the_scheme_is_read_in_any_case(join: Callable[..., Team]) -> None:
    team = join("alpha")
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = {"Authorization": f"{scheme} {team.token}"}
        assert team.client.get("/jobs", headers=headers).status_code == 200


@pytest.mark.parametrize("held", list(Scope))
def test_each_scope_opens_its_own_routes_and_admin_all(
    join: Callable[..., Team], held: Scope
) -> None:
    caller = join(f"only-{held}", held)
    for method, path, access in ALL:
        if access == PUBLIC:
            continue
        filled = "/".join("none" if step.startswith("{") else step for step in path.split("/"))
        answer = caller.request(method, filled)
        allowed = held in {access, Scope.ADMIN}
        assert (answer.status_code == 403) is not allowed, f"{method} {path}: {answer.text}"
        if not allowed:
            assert code_of(answer) == "scope_missing"


def code_of(answer: Any) -> str:
    """Of a problem, in either form."""
    found = answer.json()
    return str(found["error"]["code"] if "error" in found else found["code"])
