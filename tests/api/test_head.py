"""HEAD is answered wherever GET is: the same status and headers, and no body."""

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from api.app import ROUTES
from api.services import Services
from store.keys import Scope
from tests.api.conftest import MODEL, new_team
from tests.api.world import World

PATHS = sorted({
    route.path
    for module in ROUTES
    for route in module.router.routes
    if isinstance(route, APIRoute) and "GET" in route.methods
})
OWN = {"x-request-id", "date"}
"""Headers that no two answers have alike."""


@pytest.fixture
def world(client: TestClient, services: Services, tmp_path: Path) -> World:
    team = new_team(client, "alpha", Scope.READ, Scope.WRITE, Scope.INFER, Scope.ADMIN)
    return World(team, services, tmp_path)


def test_every_path_that_can_be_read_can_be_asked_about(world: World) -> None:
    ids = {
        "job_id": world.ended_jobs[0],
        "fine_tuning_job_id": world.ended_jobs[0],
        "dataset_id": world.dataset,
        "file_id": world.dataset,
        "adapter_id": world.adapter,
        "model_id": MODEL,
        "model": MODEL,
        "name": "smolvlm_fast",
        "key_id": world.new_key(),
    }
    seen = 0
    for path in [*PATHS, "/openapi.json", "/nothing", "/v1/nothing"]:
        names = {**ids, "name": "alpha"} if path.startswith("/teams") else ids
        there = re.sub(r"\{(\w+)(?::path)?\}", lambda found, names=names: names[found[1]], path)
        read, asked = world.team.get(there), world.team.request("HEAD", there)
        assert (asked.status_code, asked.content) == (read.status_code, b""), there
        measures = path in {"/metrics", "/readyz"}  # numbers of now, of more digits or fewer
        unlike = {"content-length"} if measures else set()
        assert facts(asked, unlike) == facts(read, unlike), there
        if "content-length" in read.headers and not measures:
            assert int(asked.headers["content-length"]) == len(read.content), there
        seen += read.status_code == 200
    assert seen > len(PATHS) - 5


def facts(answer: Any, unlike: set[str]) -> dict[str, str]:
    changing = OWN | unlike
    return {name: value for name, value in answer.headers.items() if name not in changing}


def test_a_download_tells_its_size_and_is_not_read(
    world: World, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/adapters/{world.adapter}/download"
    read = world.team.get(path)
    assert int(read.headers["content-length"]) == len(read.content)
    opened: list[str] = []
    monkeypatch.setattr(services.objects, "open_stream", opened.append)
    asked = world.team.request("HEAD", path)
    assert asked.headers["content-length"] == read.headers["content-length"]
    assert opened == []


def test_a_stream_that_has_no_end_is_not_waited_for(world: World) -> None:
    running = world.jobs[3]
    asked = world.team.request(
        "HEAD", f"/jobs/{running}/events", headers={"Accept": "text/event-stream"}
    )
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-type"].startswith("text/event-stream")


def test_a_key_is_asked_for_all_the_same(client: TestClient) -> None:
    asked = client.head("/jobs")
    assert (asked.status_code, asked.content) == (401, b"")


def test_a_path_that_only_takes_posts_takes_no_head(client: TestClient, app: FastAPI) -> None:
    assert app
    asked = client.head("/infer")
    assert (asked.status_code, asked.headers["allow"]) == (405, "POST")
    assert client.put("/jobs").headers["allow"] == "GET, HEAD, POST"
