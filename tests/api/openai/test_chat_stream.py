"""Streams that end badly or early; the inference worker's part is played through the mailbox."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from api.openai import chat_stream
from store import workers
from store.database import transaction
from store.inference import Mailbox
from tests.api.conftest import MODEL
from tests.api.openai.conftest import Server, home_settings, serving

HELLO: Any = [{"role": "user", "content": "Hello?"}]
ENDED = {
    "output": "one two",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 3, "image_tokens": 0, "completion_tokens": 2},
}


@pytest.fixture
def played(tmp_path: Path, sqlite_template: Path, valkey: str) -> Iterator[Server]:
    """A service whose inference worker is the test."""
    settings = home_settings(
        tmp_path,
        sqlite_template,
        broker_url=valkey,
        queue_prefix=f"test-{os.getpid()}-{tmp_path.name}:",
        infer_max_waiting_per_team=1,
        infer_lost_seconds=2,
    )
    with serving(settings) as running:
        with transaction(running.services.engine) as session:
            workers.register_worker(
                session, hostname="here", process_id=2, queues=["infer.cpu"], device="cpu"
            )
        yield running


def stream_of(client: OpenAI) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
    )


@contextmanager
def answering(server: Server, act: Callable[[Mailbox, str], None]) -> Iterator[None]:
    """Take the next request and answer it, in a thread."""

    def work() -> None:
        mailbox = Mailbox(server.services.settings)
        while (taken := mailbox.take_next("cpu")) is None:
            time.sleep(0.01)
        act(mailbox, taken["id"])
        mailbox.close_sync()

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join(10)
    assert not thread.is_alive()


def say(mailbox: Mailbox, request_id: str, *pieces: str) -> None:
    at = 0
    for piece in pieces:
        mailbox.answer(request_id, {"delta": piece, "at": at})
        at += len(piece)


def test_pieces_come_as_they_are_said_and_end_with_the_usage(played: Server) -> None:
    told = threading.Event()

    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one")
        assert told.wait(5), "the first piece did not arrive before the second was said"
        mailbox.answer(request_id, {"delta": " two", "at": 3})
        mailbox.answer(request_id, ENDED)

    with answering(played, act):
        found = []
        for chunk in stream_of(played.client("alpha")):
            found += [choice.delta.content for choice in chunk.choices]
            if "one" in found:
                told.set()
        usage = chunk.usage
    assert found == ["", "one", " two", None]
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 2, 5)


def test_a_failure_in_mid_stream_is_an_error_of_the_client(played: Server) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one")
        error = {"code": "unexpected", "category": "system", "message": "It broke."}
        mailbox.answer(request_id, {"error": error})

    with answering(played, act):
        stream = stream_of(played.client("alpha"))
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "one"]
        with pytest.raises(openai.APIError, match=r"It broke\.") as failed:
            next(stream)
    assert failed.value.type == "server_error"
    assert failed.value.code == "inference_broken"


def test_a_failure_in_mid_stream_points_into_the_request_as_it_was_sent(played: Server) -> None:
    detail = "The answer cannot be held to the schema."
    fault = {"pointer": "/schema", "code": "grammar_too_complex", "detail": detail}
    error = {"code": fault["code"], "category": "user", "message": detail, "faults": [fault]}

    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one")
        mailbox.answer(request_id, {"error": error})

    with answering(played, act):
        stream = played.client("alpha").chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, response_format={"type": "json_object"}
        )
        with pytest.raises(openai.APIError, match=detail) as failed:
            list(stream)
    assert (failed.value.code, failed.value.param) == (
        "grammar_too_complex",
        "response_format.schema",
    )


@pytest.mark.slow
def test_a_worker_that_dies_in_mid_stream_ends_it(played: Server) -> None:
    with answering(played, lambda mailbox, request_id: say(mailbox, request_id, "one")):
        started = time.monotonic()
        with pytest.raises(openai.APIError) as failed:
            list(stream_of(played.client("alpha")))
    assert failed.value.code == "inference_worker_lost"
    assert time.monotonic() - started < 10


def test_a_failure_before_the_first_piece_is_a_status(played: Server) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        error = {"code": "request_too_large", "category": "user", "message": "Too long."}
        mailbox.answer(request_id, {"error": error})

    with answering(played, act), pytest.raises(openai.BadRequestError) as failed:
        stream_of(played.client("alpha"))
    assert failed.value.code == "context_length_exceeded"


def test_an_empty_answer_is_a_stream_too(played: Server) -> None:
    with answering(played, lambda mailbox, one: mailbox.answer(one, {**ENDED, "output": ""})):
        chunks = list(stream_of(played.client("alpha")))
    assert [each.delta.content for chunk in chunks for each in chunk.choices] == ["", None]


def test_silence_is_filled_with_comments(played: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_stream, "HEARTBEAT_SECONDS", 0.05)

    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one")
        time.sleep(0.4)
        mailbox.answer(request_id, {"delta": " two", "at": 3})
        mailbox.answer(request_id, ENDED)

    with answering(played, act):
        calls = played.client("alpha").chat.completions.with_streaming_response
        with calls.create(model=MODEL, messages=HELLO, stream=True) as response:
            lines = list(response.iter_lines())
    assert lines.count(": keep-alive") >= 1
    assert lines[-2:] == ["data: [DONE]", ""]


def test_a_caller_who_goes_away_cancels_the_request(played: Server) -> None:
    gone = threading.Event()

    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one")
        deadline = time.monotonic() + 60
        while not mailbox.is_cancelled(request_id) and time.monotonic() < deadline:
            mailbox.renew([request_id])
            time.sleep(0.02)
        if mailbox.is_cancelled(request_id):
            gone.set()

    with answering(played, act):
        stream = stream_of(played.client("alpha"))
        assert next(stream).choices[0].delta.role == "assistant"
        assert not gone.is_set()
        stream.close()
    assert gone.is_set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_team_with_too_much_waiting_is_told_to_come_again(played: Server, stream: bool) -> None:
    first = threading.Thread(target=ask_and_forget, args=(played,))
    first.start()
    while played.services.mailbox.num_waiting("cpu") == 0:
        time.sleep(0.01)
    with pytest.raises(openai.RateLimitError) as refused:
        played.client("alpha").chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert (refused.value.code, refused.value.type) == ("queue_full", "rate_limit_error")
    assert int(refused.value.response.headers["Retry-After"]) > 0
    with answering(played, lambda mailbox, one: mailbox.answer(one, ENDED)):
        first.join(10)
    assert not first.is_alive()


def ask_and_forget(server: Server) -> None:
    server.client("alpha").chat.completions.create(model=MODEL, messages=HELLO)
