"""Links, Location headers and errors below the prefix of a proxy."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import NotFoundError, OpenAI
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from grit_client.client import GritClient
from store.settings import Settings
from tests.api.conftest import MODEL, job_body, new_team, opened, rows

PREFIX = "/team-a/grit"
BAD_ROWS = b'{"messages": []}\n'


@contextmanager
def served(app: ASGIApp, **options: Any) -> Iterator[str]:
    """Serve an app on a port of its own; yields the address."""
    config = uvicorn.Config(app, port=0, log_level="warning", ws="none", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def proxy(target: str, *, cuts: bool, names: bool) -> Starlette:
    """A reverse proxy for everything below the prefix.

    Args:
        target: Address of the service.
        cuts: Whether it cuts the prefix off.
        names: Whether it says which it was.
    """

    async def forward(request: Request) -> Response:
        path = request.url.path.removeprefix(PREFIX) if cuts else request.url.path
        headers = {k: v for k, v in request.headers.items() if k not in {"host", "connection"}}
        if names:
            headers["X-Forwarded-Prefix"] = PREFIX
        async with httpx.AsyncClient(timeout=30) as client:
            answer = await client.request(
                request.method,
                target + path,
                params=request.query_params,
                headers=headers,
                content=await request.body(),
            )
        hop = {"content-length", "transfer-encoding", "connection"}
        kept = {k: v for k, v in answer.headers.items() if k not in hop}
        return Response(answer.content, answer.status_code, kept)

    methods = ["GET", "POST", "DELETE", "HEAD"]
    return Starlette(routes=[Route(f"{PREFIX}/{{path:path}}", forward, methods=methods)])


@dataclass
class Caller:
    """Somebody who knows the service by its address below a prefix."""

    origin: str
    headers: dict[str, str]

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {**self.headers, **options.pop("headers", {})}
        return httpx.request(method, self.origin + path, headers=headers, timeout=30, **options)

    @property
    def key(self) -> str:
        return self.headers["Authorization"].removeprefix("Bearer ")


WAYS = ["the proxy says so", "the deployment says so", "nothing is cut off", "the server says so"]


@pytest.fixture(params=WAYS)
def caller(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Caller]:
    way = request.param
    configured = PREFIX if way in {WAYS[1], WAYS[2]} else ""
    options = {"root_path": PREFIX} if way == WAYS[3] else {}
    with opened(settings.model_copy(update={"root_path": configured})) as app:
        headers = new_team(TestClient(app), "alpha").headers
        with (
            served(app, **options) as target,
            served(proxy(target, cuts=way != WAYS[2], names=way == WAYS[0])) as origin,
        ):
            yield Caller(origin, headers)


def test_every_link_of_an_answer_can_be_followed(caller: Caller) -> None:
    upload = {"file": ("rows.jsonl", rows(8))}
    made = caller.ask("POST", f"{PREFIX}/datasets", files=upload)
    dataset = made.json()
    job = caller.ask("POST", f"{PREFIX}/jobs", json=job_body(dataset["id"]))
    shown = caller.ask("GET", f"{PREFIX}/jobs/{job.json()['id']}")
    model = caller.ask("GET", f"{PREFIX}/models/{MODEL}")
    file = caller.ask("POST", f"{PREFIX}/v1/files", files=upload, data={"purpose": "fine-tune"})
    tuning = caller.ask(
        "POST",
        f"{PREFIX}/v1/fine_tuning/jobs",
        json={"model": MODEL, "training_file": dataset["id"]},
    )
    answers = [made, job, shown, model]
    assert [answer.status_code for answer in answers] == [201, 201, 200, 200]
    places = [each.headers["Location"] for each in (made, job, file, tuning)]
    links = [link for answer in answers for link in answer.json()["links"].values()]
    for link in [*places, *links]:
        assert link.startswith(f"{PREFIX}/")
        assert not link.startswith(f"{PREFIX}{PREFIX}")
        followed = caller.ask("GET", link)
        # A job that has not run has no manifest yet, and says so.
        assert followed.status_code == 200 or "no manifest" in followed.text.lower(), link


def test_the_report_of_a_refused_upload_can_be_followed(caller: Caller) -> None:
    refused = caller.ask("POST", f"{PREFIX}/datasets", files={"file": ("rows.jsonl", BAD_ROWS)})
    assert caller.ask("GET", refused.json()["report"]).json()["num_bad_rows"] == 1
    told = caller.ask(
        "POST",
        f"{PREFIX}/v1/files",
        files={"file": ("rows.jsonl", BAD_ROWS)},
        data={"purpose": "fine-tune"},
    )
    assert f"GET {PREFIX}/datasets/" in told.json()["error"]["message"]


def test_clients_work_below_the_prefix(caller: Caller) -> None:
    with OpenAI(
        base_url=f"{caller.origin}{PREFIX}/v1", api_key=caller.key, max_retries=0
    ) as openai:
        assert [model.id for model in openai.models.list()] == [MODEL]
        with pytest.raises(NotFoundError) as refused:
            openai.models.retrieve("none")
        assert refused.value.code == "model_not_found"
        with pytest.raises(NotFoundError, match=f"{PREFIX}/v1/chat/completions"):
            openai.embeddings.create(model=MODEL, input="x")
    with GritClient(f"{caller.origin}{PREFIX}", caller.key) as client:
        assert next(iter(client.list_models()))["links"]["self"] == f"{PREFIX}/models/{MODEL}"


def test_the_document_names_the_prefix_as_its_server(caller: Caller) -> None:
    document = caller.ask("GET", f"{PREFIX}/openapi.json").json()
    assert document["servers"] == [{"url": PREFIX}]
    assert "/jobs" in document["paths"]


def test_callers_of_one_moment_have_each_their_own_links(settings: Settings) -> None:
    with opened(settings) as app, TestClient(app) as client:
        team = new_team(client, "alpha")
        job = team.job()["id"]
        for prefix in ("/a", "", "/b/c", "/a/"):
            shown = team.get(f"/jobs/{job}", headers={"X-Forwarded-Prefix": prefix})
            assert shown.json()["links"]["self"] == f"{prefix.rstrip('/')}/jobs/{job}"


def test_an_app_may_be_mounted_below_a_prefix(settings: Settings) -> None:
    with opened(settings) as app:
        team = new_team(TestClient(app), "alpha")
        outer = TestClient(Starlette(routes=[Mount(PREFIX, app)]))
        shown = outer.get(f"{PREFIX}/models/{MODEL}", headers=team.headers)
        assert shown.json()["links"]["self"] == f"{PREFIX}/models/{MODEL}"
        missing = outer.get(f"{PREFIX}/v1/nothing", headers=team.headers)
        assert missing.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    "prefix",
    ["grit", "//evil.example", "/a b", "/a,/b", "http://x", "/\u00e4", "/..", "/a/../b", "/./b"],
)
def test_a_prefix_that_is_no_path_is_refused(client: TestClient, prefix: str) -> None:
    answer = client.get("/healthz", headers={"X-Forwarded-Prefix": prefix.encode()})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert "X-Forwarded-Prefix" in answer.json()["detail"]


@pytest.mark.parametrize("prefix", ["grit", "/grit/", "/", "//grit", "/a b"])
def test_a_setting_that_is_no_path_is_refused(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(ValidationError, match="root_path"):
        Settings(home=tmp_path, root_path=prefix)
