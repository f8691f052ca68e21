"""Retries and errors, against a real HTTP server that answers as it is told."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from grit_client.connection import Connection, Retries
from grit_client.errors import (
    InvalidInput,
    RequestRefused,
    ServiceUnavailable,
    ServiceUnreachable,
)

QUICK = Retries(first_seconds=0.01, longest_seconds=1.0)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False


@dataclass
class Scripted:
    """A server that gives its answers in order and repeats the last one."""

    url: str
    answers: list[Answer]
    requests: list[tuple[str, str, bytes]]


@pytest.fixture
def server() -> Iterator[Scripted]:
    answers: list[Answer] = []
    requests: list[tuple[str, str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            requests.append((self.command, self.path, body))
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer.hang_up:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = do_DELETE = handle_any  # noqa: N815 - names of the standard library

        def log_message(self, *_: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield Scripted(f"http://127.0.0.1:{made.server_address[1]}", answers, requests)
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def connection(server: Scripted) -> Iterator[Connection]:
    made = Connection(server.url, "grit_a_b", retries=QUICK)
    yield made
    made.close()


def test_patience_asked_for_is_given(server: Scripted, connection: Connection) -> None:
    server.answers += [Answer(503, headers={"Retry-After": "0.2"}), Answer(body=b'{"a": 1}')]
    began = time.monotonic()
    assert connection.json("POST", "/jobs", json={"x": 1}, idempotent=True) == {"a": 1}
    assert time.monotonic() - began >= 0.2
    assert [body for _, _, body in server.requests] == [b'{"x": 1}'] * 2


def test_more_patience_than_we_have_is_an_error_at_once(
    server: Scripted, connection: Connection
) -> None:
    server.answers.append(Answer(429, headers={"Retry-After": "3600"}))
    with pytest.raises(ServiceUnavailable):
        connection.json("GET", "/jobs")
    assert len(server.requests) == 1


def test_a_request_that_may_have_been_heard_is_not_repeated(
    server: Scripted, connection: Connection
) -> None:
    server.answers += [Answer(hang_up=True), Answer()]
    with pytest.raises(ServiceUnreachable, match="broke off"):
        connection.json("POST", "/keys", json={})
    assert len(server.requests) == 1


def test_a_request_that_changes_nothing_twice_is_repeated(
    server: Scripted, connection: Connection
) -> None:
    server.answers += [Answer(hang_up=True), Answer(502), Answer()]
    assert connection.json("GET", "/jobs") == {}
    assert len(server.requests) == 3


def test_an_answer_that_was_worked_on_is_not_asked_for_again(
    server: Scripted, connection: Connection
) -> None:
    server.answers.append(Answer(503, b'{"code": "inference_timeout"}', {"Retry-After": "0"}))
    with pytest.raises(ServiceUnavailable):
        connection.json("POST", "/infer", json={})
    assert len(server.requests) == 1
    server.answers[:] = [Answer(503, b'{"code": "no_inference_worker"}'), Answer()]
    assert connection.json("POST", "/infer", json={}) == {}


def test_trying_again_has_an_end(server: Scripted, connection: Connection) -> None:
    server.answers.append(Answer(503))
    with pytest.raises(ServiceUnavailable):
        connection.json("GET", "/jobs")
    assert len(server.requests) == QUICK.attempts


def test_a_bug_of_the_service_is_not_repeated(server: Scripted, connection: Connection) -> None:
    server.answers.append(Answer(500, b'{"detail": "broken"}'))
    with pytest.raises(ServiceUnavailable, match="broken"):
        connection.json("GET", "/jobs")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>no</html>", b"[]", b"5", b'{"errors": 5}', b'{"errors": [5, {}]}', b"\xff"],
)
def test_any_error_document_becomes_one_error(
    server: Scripted, connection: Connection, body: bytes
) -> None:
    server.answers.append(Answer(422, body))
    with pytest.raises(RequestRefused) as raised:
        connection.json("GET", "/jobs")
    assert raised.value.problem.status == 422
    assert str(raised.value)


def test_an_address_that_is_no_grit_service_is_said_so(
    server: Scripted, connection: Connection
) -> None:
    server.answers.append(Answer(body=b"<html>Hello</html>"))
    with pytest.raises(ServiceUnreachable, match="not JSON"):
        connection.json("GET", "/jobs")


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1", "nonsense", "http://[", "http://127.0.0.1:99999"]
)
def test_an_address_that_is_no_url_is_one_of_our_errors(url: str) -> None:
    def ask() -> None:
        Connection(url, retries=Retries(attempts=1)).json("GET", "/jobs")

    with pytest.raises((InvalidInput, ServiceUnreachable)):
        ask()


def test_the_key_and_nothing_else_is_sent(server: Scripted, connection: Connection) -> None:
    server.answers.append(Answer())
    connection.json("DELETE", "/keys/key_1")
    assert server.requests == [("DELETE", "/keys/key_1", b"")]
