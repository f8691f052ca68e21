"""A body that comes too slowly is refused (B22); one that takes its time at a pace is not."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI

from store.settings import Settings
from tests.api.conftest import Team, job_body

PACE_SECONDS = 0.4
TRICKLE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"{" * 100


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"slow_body_seconds": PACE_SECONDS})


@pytest.fixture
def port(app: FastAPI) -> Iterator[int]:
    """Serve the app on a free port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def send(team: Team, port: int, path: str, pieces: list[bytes], *, pause: float, kind: str) -> str:
    """Send a body piece by piece, as long as nothing comes back; return the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {team.token}\r\n"
        size = sum(map(len, pieces))
        link.sendall(f"{head}Content-Type: {kind}\r\nContent-Length: {size}\r\n\r\n".encode())
        for piece in pieces:
            link.settimeout(pause)
            try:
                if link.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                link.sendall(piece)
        link.settimeout(10)
        answer = b""
        while part := link.recv(65536):
            answer += part
            if b"\r\n\r\n" in answer and b"Connection: close" not in answer.title():
                break
        return answer.decode()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/jobs", "application/json"),
        ("/datasets", "multipart/form-data; boundary=x"),
        ("/v1/files", "multipart/form-data; boundary=x"),
    ],
)
def test_a_body_that_trickles_is_refused_and_the_connection_closed(
    team: Team, port: int, path: str, kind: str
) -> None:
    started = time.monotonic()
    answer = send(
        team, port, path, [TRICKLE[at : at + 1] for at in range(100)], pause=0.05, kind=kind
    )
    assert answer.startswith("HTTP/1.1 408 ")
    assert "request_timeout" in answer
    assert "connection: close" in answer.lower()
    assert time.monotonic() - started < 4 * PACE_SECONDS


def test_a_body_that_stops_is_refused(team: Team, port: int) -> None:
    body = json.dumps(job_body("ds_x")).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
        head = f"POST /jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {team.token}\r\n"
        link.sendall(f"{head}Content-Type: application/json\r\n".encode())
        link.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:10])
        assert link.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_takes_its_time_at_a_pace_is_read(team: Team, port: int) -> None:
    body = json.dumps(job_body("ds_x", name="x" * 190, metadata={"k" * 60: "v" * 500})).encode()
    padded = body + b" " * (8 * 600 - len(body))
    pieces = [padded[at : at + 600] for at in range(0, len(padded), 600)]
    answer = send(team, port, "/jobs", pieces, pause=0.15, kind="application/json")
    assert answer.startswith("HTTP/1.1 422 ")
    assert "dataset_not_found" in answer


def test_nothing_is_asked_of_a_request_without_a_body(team: Team) -> None:
    job = team.job()["id"]
    started = time.monotonic()
    assert team.get(f"/jobs/{job}?wait=1").status_code == 200
    assert time.monotonic() - started >= 1
