"""A team sees its own rows alone; every route has a rule, and every id a case here."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from api.app import ROUTES
from api.auth import PUBLIC, access_of
from api.routing import ServiceRoute, service_router
from api.services import Services
from store import adapters
from store.database import transaction
from store.keys import Scope
from store.models import AdapterOrigin
from tests.api.conftest import MODEL, Team, app_settings, job_body, new_team, opened

ALL_ROUTES = [route for module in ROUTES for route in module.router.routes]
SHARED = {"model_id", "name", "key_id"}
"""Ids that belong to no team: base models and presets; keys are the administrators'."""
BODIES: dict[str, dict[str, Any]] = {"/adapters/{adapter_id}/compress": {}}
"""What the routes that want a body are sent."""


def cases() -> list[Any]:
    found = []
    for route in ALL_ROUTES:
        if not isinstance(route, APIRoute):
            continue
        names = {field.name for field in route.dependant.path_params}
        for name in names - SHARED:
            found += [
                pytest.param(method, route.path, name, id=f"{method} {route.path}")
                for method in route.methods
            ]
    return found


@pytest.fixture(scope="module")
def client(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One app for all: strangers change nothing."""
    folder = tmp_path_factory.mktemp("isolation")
    shutil.copy(sqlite_template, folder / "grit.db")
    with (
        opened(app_settings(folder / "home", f"sqlite:///{folder}/grit.db")) as app,
        TestClient(app, raise_server_exceptions=False) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def services(client: TestClient) -> Services:
    found: Services = cast("FastAPI", client.app).state.services
    return found


@pytest.fixture(scope="module")
def join(client: TestClient) -> Callable[..., Team]:
    return lambda name, *scopes: new_team(client, name, *scopes)


@pytest.fixture(scope="module")
def owned(join: Callable[..., Team], services: Services) -> dict[str, str]:
    """One row of each kind, of another team."""
    owner = join("owner")
    job = owner.job()
    with transaction(services.engine) as session:
        adapter = adapters.create_adapter(
            session, team="owner", origin=AdapterOrigin.IMPORT, model=MODEL, prefix="adapters/x/"
        )
    return {
        "job_id": job["id"],
        "dataset_id": job["dataset"],
        "adapter_id": adapter.id,
        "fine_tuning_job_id": job["id"],
        "file_id": job["dataset"],
        "model": adapter.id,
    }


@pytest.mark.parametrize(("method", "path", "name"), cases())
def test_another_teams_row_is_not_found(
    join: Callable[..., Team], owned: dict[str, str], method: str, path: str, name: str
) -> None:
    assert name in owned, f"a new kind of id {name!r}: make one of it in `owned`"
    stranger = join("stranger", *Scope)
    body = BODIES.get(path)
    plain = path.replace(":path}", "}")
    real = stranger.request(method, plain.replace(f"{{{name}}}", owned[name]), json=body)
    unknown = owned[name][:-4] + "0000"
    other = stranger.request(method, plain.replace(f"{{{name}}}", unknown), json=body)
    assert real.status_code == other.status_code == 404
    code, detail = code_and_words(real)
    assert code == ("model_not_found" if name == "model" else "not_found")
    assert detail.replace(owned[name], unknown) == code_and_words(other)[1]


def code_and_words(answer: Any) -> tuple[str, str]:
    """Of a problem, in either form."""
    found = answer.json()
    if answer.request.url.path.startswith("/v1/"):
        return found["error"]["code"], found["error"]["message"]
    return found["code"], found["detail"]


@pytest.mark.parametrize(
    "path", ["/jobs", "/datasets", "/adapters", "/v1/files", "/v1/fine_tuning/jobs"]
)
def test_a_list_holds_the_teams_own_rows(
    join: Callable[..., Team], owned: dict[str, str], path: str
) -> None:
    assert owned
    assert join("stranger", *Scope).get(path).json()["data"] == []
    assert join("owner").get(path).json()["data"]


def test_a_job_cannot_name_another_teams_dataset(
    join: Callable[..., Team], owned: dict[str, str]
) -> None:
    stranger = join("stranger")
    body = {"model": MODEL, "dataset": owned["dataset_id"], "preset": "smolvlm_fast"}
    real = stranger.post("/jobs", json=body)
    unknown = stranger.post("/jobs", json={**body, "dataset": owned["dataset_id"][:-4] + "0000"})
    for answer in (real, unknown):
        assert answer.status_code == 422
        assert [fault["code"] for fault in answer.json()["errors"]] == ["dataset_not_found"]


@pytest.mark.parametrize("field", ["eval_dataset", "retention_dataset"])
def test_a_job_cannot_be_measured_on_another_teams_dataset(
    join: Callable[..., Team], owned: dict[str, str], field: str
) -> None:
    stranger = join("stranger")
    answer = stranger.post(
        "/jobs", json=job_body(stranger.dataset(), **{field: owned["dataset_id"]})
    )
    assert answer.status_code == 422
    faults = [(fault["code"], fault["pointer"]) for fault in answer.json()["errors"]]
    assert faults == [("dataset_not_found", f"/{field}")]


@pytest.mark.parametrize("field", ["adapter", "job"])
def test_inference_cannot_name_another_teams_rows(
    join: Callable[..., Team], owned: dict[str, str], field: str
) -> None:
    body = {field: owned[f"{field}_id"], "prompt": "x"}
    assert join("stranger").post("/infer", json=body).status_code == 404


def test_every_route_is_ours_and_has_a_rule() -> None:
    assert all(isinstance(route, ServiceRoute) for route in ALL_ROUTES)
    public = {
        route.path
        for route in ALL_ROUTES
        if isinstance(route, APIRoute) and access_of(route.endpoint) == PUBLIC
    }
    assert public == {"/healthz", "/readyz", "/metrics", "/version"}


def test_a_new_route_without_a_rule_is_refused_at_its_making() -> None:
    router = service_router("test")
    with pytest.raises(LookupError, match="no access rule"):

        @router.get("/forgotten")
        def forgotten() -> None: ...


def test_the_app_has_no_routes_but_these(client: TestClient) -> None:
    app = cast("FastAPI", client.app)
    plain = APIRouter()
    assert not plain.routes
    own = {getattr(route, "path", None) for route in app.routes} - {None}
    assert own <= {"/openapi.json", *(getattr(route, "path", "") for route in ALL_ROUTES)}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param(method, route.path, id=f"{method} {route.path}")
        for route in ALL_ROUTES
        if isinstance(route, APIRoute) and access_of(route.endpoint) != PUBLIC
        for method in route.methods
    ],
)
def test_no_route_answers_without_a_key_or_with_the_wrong_scope(
    join: Callable[..., Team], method: str, path: str
) -> None:
    team = join("alpha", Scope.READ)
    assert team.client.request(method, path).status_code == 401
    route = next(
        each
        for each in ALL_ROUTES
        if isinstance(each, APIRoute) and each.path == path and method in each.methods
    )
    lacking = {Scope.READ, Scope.WRITE, Scope.INFER} - {access_of(route.endpoint)}
    weak = join("weak", *(Scope(scope) for scope in lacking))
    assert weak.request(method, path).status_code == 403
