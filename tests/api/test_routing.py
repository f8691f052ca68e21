"""Which router answers a path."""

from collections.abc import Callable

import pytest
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from api.auth import allow_anyone
from api.routing import ServiceRouter


class _Open:
    async def admit(self, *_: object) -> None:
        """Let everybody pass."""


def _job(job_id: str) -> str:
    return f"job {job_id}"


def _name(name: str) -> str:
    return f"v1 {name}"


def _router(endpoints: dict[str, Callable[..., str]]) -> ServiceRouter:
    router = ServiceRouter("test")
    for path, endpoint in endpoints.items():
        router.get(path)(allow_anyone(endpoint))
    return router


@pytest.mark.parametrize(
    ("path", "answer"),
    [("/jobs/plan", "plan"), ("/jobs/one", "job one"), ("/jobsy", "jobsy"), ("/v1/a/b", "v1 a/b")],
)
def test_a_path_finds_its_route_in_whichever_router_it_is(path: str, answer: str) -> None:
    app = FastAPI()
    app.include_router(_router({"/jobs/plan": lambda: "plan"}))
    app.include_router(_router({"/jobsy": lambda: "jobsy"}))
    app.include_router(_router({"/jobs/{job_id}": _job, "/v1/{name:path}": _name}))
    app.state.doorkeeper = _Open()

    with TestClient(app) as client:
        assert client.get(path).json() == answer


def test_a_path_that_begins_as_no_route_of_a_router_costs_it_one_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = _router({"/jobs/{job_id}": _job, "/v1/{name:path}": _name})

    def looked_further(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(APIRouter, "matches", looked_further)
    for path in ("/", "/job", "/presets/a", "/v2/a", ""):
        router.matches({"type": "http", "path": path, "root_path": ""})
    with pytest.raises(AssertionError):
        router.matches({"type": "http", "path": "/behind/jobs/a", "root_path": "/behind"})
