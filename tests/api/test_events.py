"""Events as a page, and as a stream from a real server."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from api.routes import job_events
from api.services import Services
from store import events
from store.database import transaction
from tests.api.conftest import Team


@pytest.fixture
def server(app: FastAPI) -> Iterator[str]:
    """Serve the app on a free port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    made = uvicorn.Server(config)
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not made.started and time.monotonic() < deadline:
        time.sleep(0.01)
    [listener] = made.servers
    port = listener.sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    made.should_exit = True
    thread.join(timeout=10)


def told(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Read Server-Sent Events; a comment is one without data."""
    event: dict[str, Any] = {}
    for line in lines:
        if not line:
            if event:
                yield event
            event = {}
        elif line.startswith(":"):
            event["comment"] = line[1:].strip()
        else:
            name, _, value = line.partition(": ")
            event[name] = json.loads(value) if name == "data" else value


def follow(server: str, team: Team, job: str, **headers: str) -> list[dict[str, Any]]:
    sent = {**team.headers, "Accept": "text/event-stream", **headers}
    with httpx.stream("GET", f"{server}/jobs/{job}/events", headers=sent, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        return [event for event in told(answer.iter_lines()) if "data" in event]


def test_a_page_goes_on_where_the_last_one_ended(team: Team, services: Services) -> None:
    job = team.job()["id"]
    with transaction(services.engine) as session:
        for number in range(5):
            events.append(session, job, "note", {"number": number})
    first = team.get(f"/jobs/{job}/events?limit=3").json()
    rest = team.get(f"/jobs/{job}/events?limit=10&after={first['next']}").json()
    sequence = [event["sequence"] for event in first["data"] + rest["data"]]
    assert sequence == list(range(1, len(sequence) + 1))
    assert rest["next"] is None
    assert first["data"][0]["type"] == "status_changed"


def test_a_stream_follows_a_job_to_its_final_event_and_ends(
    team: Team, services: Services, server: str
) -> None:
    job = team.job()["id"]

    def act() -> None:
        time.sleep(0.5)
        with transaction(services.engine) as session:
            events.append(session, job, "note", {"text": "two\nlines"})
        team.post(f"/jobs/{job}/cancel")

    actor = threading.Thread(target=act)
    actor.start()
    found = follow(server, team, job)
    actor.join()
    assert [int(event["id"]) for event in found] == list(range(1, len(found) + 1))
    assert found[-2]["data"]["payload"] == {"text": "two\nlines"}
    assert found[-1]["event"] == "status_changed"
    assert found[-1]["data"]["payload"]["to"] == "cancelled"


def test_a_stream_replays_from_the_last_event_that_was_seen(
    team: Team, services: Services, server: str
) -> None:
    job = team.job()["id"]
    with transaction(services.engine) as session:
        for number in range(5):
            events.append(session, job, "note", {"number": number})
    team.post(f"/jobs/{job}/cancel")
    everything = follow(server, team, job)
    rest = follow(server, team, job, **{"Last-Event-ID": "3"})
    assert [event["id"] for event in rest] == [event["id"] for event in everything[3:]]


def test_a_stream_after_the_final_event_is_empty_for_good(team: Team) -> None:
    job = team.job()["id"]
    team.post(f"/jobs/{job}/cancel")
    last = team.get(f"/jobs/{job}/events").json()["data"][-1]["sequence"]
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(last)}
    assert team.get(f"/jobs/{job}/events", headers=headers).status_code == 204


@pytest.mark.parametrize("value", ["x", "-1", "9" * 30, "1.5"])
def test_a_bad_last_event_id_is_refused(team: Team, value: str) -> None:
    job = team.job()["id"]
    headers = {"Accept": "text/event-stream", "Last-Event-ID": value}
    answer = team.get(f"/jobs/{job}/events", headers=headers)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["parameter"] == "header.last-event-id"


def test_a_quiet_stream_has_a_heart(
    team: Team, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_events, "HEARTBEAT_SECONDS", 0.2)
    job = team.job()["id"]
    headers = {**team.headers, "Accept": "text/event-stream"}
    with httpx.stream("GET", f"{server}/jobs/{job}/events", headers=headers, timeout=10) as answer:
        heard = next(event for event in told(answer.iter_lines()) if "comment" in event)
    assert heard["comment"] == "heartbeat"


def test_a_long_batch_comes_whole_and_in_order(team: Team, services: Services, server: str) -> None:
    job = team.job()["id"]
    with transaction(services.engine) as session:
        for number in range(450):
            events.append(session, job, "note", {"number": number})
    team.post(f"/jobs/{job}/cancel")
    found = follow(server, team, job)
    assert [int(event["id"]) for event in found] == list(range(1, len(found) + 1))
    assert len(found) > 450


def test_another_teams_stream_is_not_found(join: Callable[..., Team]) -> None:
    job = join("owner").job()["id"]
    headers = {"Accept": "text/event-stream"}
    assert join("stranger").get(f"/jobs/{job}/events", headers=headers).status_code == 404
