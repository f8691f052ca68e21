"""Requests of the bad-input matrix (B65, B68, B69) that are odd in their query or their headers."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from tests.api.conftest import Team
from tests.api.test_bad_input import check


@pytest.fixture
def dataset(team: Team) -> str:
    return team.dataset()


@pytest.mark.parametrize("path", ["/jobs", "/datasets", "/adapters"])
@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=0", "out_of_range"),
        ("limit=201", "out_of_range"),
        ("limit=1e2", "type_invalid"),
        ("cursor=forged", "cursor_invalid"),
        ("cursor=%00", None),
        ("cursor=" + "A" * 5000, None),
        ("cursor=am9iXzE", "cursor_invalid"),
    ],
)
def test_a_list_is_paged_within_its_bounds(
    team: Team, path: str, query: str, code: str | None
) -> None:
    answer = team.get(f"{path}?{query}")
    check(answer, 422, code or answer.json()["code"])


@pytest.mark.parametrize("path", ["/jobs", "/infer", "/v1/chat/completions"])
def test_a_body_of_very_many_faults_is_refused_at_once_and_in_few_words(
    team: Team, path: str
) -> None:
    """Each fault is told in a hundred times the bytes that it takes to make one."""
    answer = team.send(path, json.dumps({f"k{number}": 1 for number in range(10_000)}).encode())
    assert answer.status_code in {400, 422}
    assert len(answer.content) < 20_000
    answer = team.send(path, json.dumps({"x": [1] * 40_000}).encode())
    assert answer.status_code in {400, 422}
    assert "too_many_values" in answer.text


def test_a_range_is_not_followed(team: Team, dataset: str) -> None:
    """Ranges of one file are quadratic where they are read carelessly; none are read here."""
    whole = team.get(f"/v1/files/{dataset}/content")
    ranges = "bytes=" + ",".join(f"{at}-{at + 1}" for at in range(400))
    answer = team.get(f"/v1/files/{dataset}/content", headers={"Range": ranges})
    assert (answer.status_code, answer.content) == (200, whole.content)
    assert "Accept-Ranges" not in answer.headers


@pytest.mark.parametrize("header", ["X-HTTP-Method-Override", "X-Method-Override", "X-HTTP-Method"])
def test_a_header_does_not_change_the_method(team: Team, dataset: str, header: str) -> None:
    assert team.get(f"/datasets/{dataset}", headers={header: "DELETE"}).status_code == 200
    assert team.get(f"/datasets/{dataset}?_method=DELETE").status_code == 200
    assert team.get(f"/datasets/{dataset}").status_code == 200


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 4", "Transfer-Encoding: chunked"],
        ["Content-Length: 4", "Content-Length: 40"],
        ["Content-Length: +4"],
        ["Content-Length: -1"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding : chunked"],
    ],
    ids=", ".join,
)
def test_a_body_whose_length_is_in_doubt_smuggles_no_request(
    team: Team, dataset: str, lines: list[str]
) -> None:
    """Two servers that read it differently would take its end for another caller's request."""
    inner = f"DELETE /datasets/{dataset} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {team.token}"
    head = "\r\n".join(["POST /jobs HTTP/1.1", "Host: x", "Content-Type: application/json", *lines])
    sent = f"{head}\r\n\r\n0\r\n\r\n{inner}\r\n\r\n".encode()
    with served(team) as port, socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        link.sendall(sent)
        link.shutdown(socket.SHUT_WR)
        answer = b""
        while part := link.recv(65536):
            answer += part
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", answer)
    assert statuses, answer
    assert statuses[0] in {b"400", b"401"}
    assert b"204" not in statuses
    assert team.get(f"/datasets/{dataset}").status_code == 200


@contextmanager
def served(team: Team) -> Iterator[int]:
    """Serve the app on a free port."""
    config = uvicorn.Config(
        team.client.app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)
