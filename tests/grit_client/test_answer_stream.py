"""Answers that come in pieces, from a server that does as it is told."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from grit_client.client import GritClient
from grit_client.errors import InvalidInput, ServiceUnavailable, ServiceUnreachable
from tests.grit_client.test_connection import QUICK, Answer, Scripted, server

__all__ = ["server"]

WHOLE = {"id": "inf_1", "model": "m", "adapter": None, "output": "one two", "usage": {}}


def event(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


PIECES = event("delta", {"text": "one"}) + b": keep-alive\n\n" + event("delta", {"text": " two"})


@pytest.fixture
def client(server: Scripted) -> Iterator[GritClient]:
    with GritClient(server.url, "grit_a_b", retries=QUICK) as made:
        yield made


def test_the_pieces_come_one_by_one_and_the_answer_at_the_end(
    client: GritClient,
    server: Scripted,
) -> None:
    server.answers[:] = [Answer(body=PIECES + event("done", WHOLE))]
    with client.stream("what?", model="m", max_new_tokens=5) as pieces:
        assert list(pieces) == ["one", " two"]
    assert pieces.answer == WHOLE
    assert pieces.text == WHOLE["output"]
    method, path, body = server.requests[0]
    assert (method, path) == ("POST", "/infer")
    assert json.loads(body) == {
        "model": "m",
        "prompt": "what?",
        "max_new_tokens": 5,
        "stream": True,
    }


def test_an_answer_that_breaks_off_is_never_taken_for_a_short_one(
    client: GritClient,
    server: Scripted,
) -> None:
    server.answers[:] = [Answer(body=PIECES)]
    with (
        client.stream("what?", model="m") as pieces,
        pytest.raises(ServiceUnreachable, match="after 7 characters"),
    ):
        list(pieces)
    assert pieces.answer is None
    assert pieces.text == "one two"


def test_what_goes_wrong_in_the_middle_is_raised_with_its_code(
    client: GritClient,
    server: Scripted,
) -> None:
    problem = {"status": 503, "code": "inference_worker_lost", "detail": "The worker died."}
    server.answers[:] = [Answer(body=PIECES + event("error", problem))]
    with (
        client.stream("what?", model="m") as pieces,
        pytest.raises(ServiceUnavailable, match="The worker died") as caught,
    ):
        list(pieces)
    assert caught.value.problem.code == "inference_worker_lost"
    assert pieces.text == "one two"
    assert len(server.requests) == 1  # what has begun is not asked again


def test_patience_is_given_before_the_first_piece(
    client: GritClient,
    server: Scripted,
) -> None:
    full = Answer(429, b'{"code": "queue_full", "status": 429}', {"Retry-After": "0"})
    server.answers[:] = [full, full, Answer(body=PIECES + event("done", WHOLE))]
    with client.stream("what?", model="m") as pieces:
        assert "".join(pieces) == "one two"
    assert len(server.requests) == 3


def test_a_stream_that_is_left_early_ends_the_request(
    client: GritClient,
    server: Scripted,
) -> None:
    server.answers[:] = [Answer(body=PIECES + event("done", WHOLE))]
    with client.stream("what?", model="m") as pieces:
        assert next(iter(pieces)) == "one"
    assert pieces.answer is None
    assert list(pieces) == []


def test_pieces_are_read_inside_of_the_block_alone(client: GritClient) -> None:
    with pytest.raises(RuntimeError, match="with client"):
        iter(client.stream("what?", model="m"))
    with pytest.raises(InvalidInput, match="exactly one"):
        client.stream("what?")
