"""Waiting and streaming answers over HTTP; the inference worker's part is played."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from sqlalchemy import update

import api.inference
import api.routes.infer
from api.waiting import Places, kept_alive
from store import workers
from store.database import transaction
from store.database_time import database_time_in
from store.inference import Mailbox
from store.keys import Scope, create_key
from store.models import Worker
from store.settings import Settings
from tests.api.conftest import MODEL, opened

ENDED = {
    "output": "one two",
    "finish_reason": "stop",
    "usage": {
        "prompt_tokens": 3,
        "image_tokens": 0,
        "completion_tokens": 2,
        "cached_prompt_tokens": 1,
        "image_cached": True,
    },
    "timing": {"total_seconds": 0.5},
}
Act = Callable[[Mailbox, str], None]


class Service:
    """A running app and a caller of it."""

    def __init__(self, app: FastAPI, url: str, settings: Settings) -> None:
        self.settings = settings
        self.engine = app.state.services.engine
        with transaction(app.state.services.engine) as session:
            _, token = create_key(session, team="alpha", name="test", scopes={Scope.INFER})
        self.http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=20
        )

    def ask(self, **fields: Any) -> httpx.Response:
        return self.http.post("/infer", json={"model": MODEL, "prompt": "x", **fields})

    def stream(self) -> Any:
        return self.http.stream(
            "POST", "/infer", json={"model": MODEL, "prompt": "x", "stream": True}
        )

    def events(self) -> list[tuple[str, Any]]:
        """All events of a stream."""
        with self.stream() as response:
            assert response.status_code == 200, response.read()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            return list(events_of(response.iter_lines()))

    @contextmanager
    def answering(self, act: Act) -> Iterator[None]:
        """Take the next request and answer it, in a thread."""

        def work() -> None:
            mailbox = Mailbox(self.settings)
            deadline = time.monotonic() + 60
            while (taken := mailbox.take_next("cpu")) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if taken is not None:
                act(mailbox, taken["id"])
            mailbox.close_sync()

        thread = threading.Thread(target=work)
        thread.start()
        yield
        thread.join(10)
        assert not thread.is_alive()


def events_of(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Parse server-sent events; comments are named by their text."""
    kind = ""
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))
        elif line.startswith(":"):
            yield line, None


@pytest.fixture
def timeout_seconds() -> float:
    """Of an answer; the tests of the time-out itself choose a short one."""
    return 30.0


@pytest.fixture
def settings(embedded_settings: Settings, timeout_seconds: float) -> Settings:
    return embedded_settings.model_copy(
        update={
            "infer_timeout_seconds": timeout_seconds,
            "infer_lost_seconds": 2,
            "infer_max_waiting_per_team": 1,
        }
    )


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    with opened(settings) as app:
        with transaction(app.state.services.engine) as session:
            workers.register_worker(
                session, hostname="here", process_id=2, queues=["infer.cpu"], device="cpu"
            )
        config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        made = Service(app, f"http://127.0.0.1:{port}", settings)
        yield made
        made.http.close()
        server.should_exit = True
        thread.join(10)


def say(mailbox: Mailbox, request_id: str, text: str, at: int) -> None:
    mailbox.answer(request_id, {"delta": text, "at": at})


def test_pieces_arrive_as_they_are_said_and_the_answer_ends_them(service: Service) -> None:
    heard = threading.Event()

    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one", 0)
        assert heard.wait(5)
        say(mailbox, request_id, " two", 3)
        mailbox.answer(request_id, ENDED)

    found = []
    with service.answering(act), service.stream() as response:
        for event in events_of(response.iter_lines()):
            found.append(event)
            heard.set()
    kinds, data = zip(*found, strict=True)
    assert kinds == ("delta", "delta", "done")
    assert [one["text"] for one in data[:2]] == ["one", " two"]
    assert data[2]["output"] == "one two"
    assert data[2]["usage"] == ENDED["usage"]
    assert response.headers["X-Accel-Buffering"] == "no"


def test_a_plain_answer_is_whole_whatever_pieces_there_were(service: Service) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one", 0)
        mailbox.answer(request_id, ENDED)

    with service.answering(act):
        answer = service.ask()
    assert (answer.status_code, answer.json()["output"]) == (200, "one two")


@pytest.mark.parametrize(
    "pieces",
    [
        [("one", 0), ("one", 0), (" two", 3)],
        [("one", 0), ("e t", 2)],
        [("one", 0), ("wo", 5)],
        [],
    ],
    ids=["one came twice", "one came in part before", "one was lost", "all were lost"],
)
def test_the_pieces_joined_are_the_output_whatever_the_connection_did(
    service: Service, pieces: list[tuple[str, int]]
) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        for text, at in pieces:
            say(mailbox, request_id, text, at)
        mailbox.answer(request_id, ENDED)

    with service.answering(act):
        found = service.events()
    assert "".join(data["text"] for kind, data in found if kind == "delta") == "one two"
    assert found[-1][0] == "done"


CALLED: dict[str, Any] = {
    **ENDED,
    "output": "So",
    "finish_reason": "tool_calls",
    "tool_calls": [{"name": "f", "arguments": '{"a":1}'}, {"name": "g", "arguments": "{}"}],
}


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, "f", "", 0), (0, "f", '{"a"', 0), (0, "f", ":1}", 4), (1, "g", "{}", 0)],
        [(0, "f", '{"a"', 0), (0, "f", '{"a"', 0), (0, "f", '"a":1}', 1)],
        [(0, "f", ":1}", 4), (1, "g", "{}", 0)],
        [(1, "g", "{}", 0)],
        [],
    ],
    ids=["all came", "one came twice", "the first was lost", "a call was lost", "all were lost"],
)
def test_the_end_makes_up_for_pieces_of_calls_that_were_lost(
    service: Service, pieces: list[tuple[int, str, str, int]]
) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        for index, name, text, at in pieces:
            call = {"index": index, "name": name}
            mailbox.answer(request_id, {"delta": text, "at": at, "call": call})
        mailbox.answer(request_id, CALLED)

    with service.answering(act):
        events = service.events()
    assert [data["text"] for kind, data in events if kind == "delta"] == ["So"]
    (done,) = [data for kind, data in events if kind == "done"]
    assert done["finish_reason"] == "tool_calls"
    for index, call in enumerate(done["tool_calls"]):
        sent = [data for kind, data in events if kind == "tool_call" and data["index"] == index]
        assert (sent[0]["name"], sent[0]["arguments"]) == (call["function"]["name"], "")
        assert "".join(data["arguments"] for data in sent) == call["function"]["arguments"]
        assert {data["id"] for data in sent} == {call["id"]}


def test_pieces_of_calls_that_are_not_the_answers_end_the_stream(service: Service) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        call = {"index": 0, "name": "other"}
        mailbox.answer(request_id, {"delta": "{", "at": 0, "call": call})
        mailbox.answer(request_id, CALLED)

    with service.answering(act):
        events = service.events()
    assert (events[-1][0], events[-1][1]["code"]) == ("error", "inference_broken")


def test_pieces_that_contradict_the_output_are_an_error(service: Service) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "two", 0)
        mailbox.answer(request_id, ENDED)

    with service.answering(act):
        found = service.events()
    assert [kind for kind, _ in found] == ["delta", "error"]
    assert found[1][1]["code"] == "inference_broken"


def test_a_failure_in_mid_stream_is_an_event_with_a_problem_document(service: Service) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one", 0)
        error = {"code": "unexpected", "category": "system", "message": "It broke."}
        mailbox.answer(request_id, {"error": error})

    with service.answering(act):
        found = service.events()
    assert [kind for kind, _ in found] == ["delta", "error"]
    problem = found[1][1]
    assert (problem["status"], problem["code"]) == (500, "inference_broken")
    assert problem["detail"] == "It broke."
    assert problem["request_id"]


def test_a_failure_before_the_first_piece_is_an_ordinary_answer(service: Service) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        error = {"code": "chat_invalid", "category": "user", "message": "Too long."}
        mailbox.answer(request_id, {"error": error})

    with service.answering(act):
        answer = service.ask(stream=True)
    assert (answer.status_code, answer.json()["code"]) == (422, "inference_failed")
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True])
def test_a_worker_that_dies_before_a_piece_is_noticed(service: Service, streams: bool) -> None:
    started = time.monotonic()
    with service.answering(lambda _mailbox, _request_id: None):
        answer = service.ask(stream=streams)
    assert (answer.status_code, answer.json()["code"]) == (503, "inference_worker_lost")
    assert answer.headers["Retry-After"]
    assert time.monotonic() - started < service.settings.infer_lost_seconds + 2


@pytest.mark.slow
def test_a_worker_that_dies_in_mid_stream_ends_it_with_an_error(service: Service) -> None:
    with service.answering(lambda mailbox, request_id: say(mailbox, request_id, "one", 0)):
        found = service.events()
    assert [kind for kind, _ in found] == ["delta", "error"]
    assert (found[1][1]["code"], found[1][1]["status"]) == ("inference_worker_lost", 503)


def test_a_worker_that_stops_hands_the_request_back(service: Service) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        error = {"code": "inference_worker_lost", "category": "system", "message": "Stopped."}
        mailbox.answer(request_id, {"error": error})

    with service.answering(act):
        answer = service.ask()
    assert (answer.status_code, answer.json()["code"]) == (503, "inference_worker_lost")
    assert answer.headers["Retry-After"]


@pytest.mark.parametrize("code", ["out_of_memory_device", "out_of_memory_host"])
def test_a_lack_of_memory_is_a_refusal_for_now_in_every_form(service: Service, code: str) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        error = {"code": code, "category": "system", "message": "No memory; fewer images."}
        mailbox.answer(request_id, {"error": error})

    with service.answering(act):
        whole = service.ask()
    with service.answering(act):
        streamed = service.ask(stream=True)
    for answer in (whole, streamed):
        assert (answer.status_code, answer.json()["code"]) == (503, code)
        assert answer.json()["detail"] == "No memory; fewer images."
        assert int(answer.headers["Retry-After"]) > 0
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    with service.answering(act):
        openai = service.http.post("/v1/chat/completions", json=chat)
    assert (openai.status_code, openai.json()["error"]["code"]) == (503, code)
    assert int(openai.headers["Retry-After"]) > 0

    def act_late(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one", 0)
        act(mailbox, request_id)

    with service.answering(act_late):
        kind, data = service.events()[-1]
    assert (kind, data["code"], data["status"]) == ("error", code, 503)


def answered(service: Service) -> bool:
    """Whether the CPU's worker is given a request."""
    with service.answering(lambda mailbox, request_id: mailbox.answer(request_id, ENDED)):
        return service.ask().status_code == 200


def test_a_card_whose_worker_is_stopping_or_silent_is_passed_over_for_a_live_cpu(
    service: Service,
) -> None:
    with transaction(service.engine) as session:
        card = workers.register_worker(
            session, hostname="here", process_id=3, queues=["infer.cuda"], device="cuda"
        ).id
        workers.beat(session, card, stopping=True)
    assert answered(service)
    with transaction(service.engine) as session:
        workers.beat(session, card)
        session.execute(
            update(Worker).where(Worker.id == card).values(seen_at=database_time_in(-60))
        )
    assert answered(service)


def test_a_request_waits_for_a_worker_that_restarts_where_no_other_answers(
    service: Service,
) -> None:
    with transaction(service.engine) as session:
        session.execute(update(Worker).values(seen_at=database_time_in(-60)))
    assert answered(service)


@pytest.mark.slow
@pytest.mark.parametrize("timeout_seconds", [3.0])
def test_a_whole_answer_that_grows_may_last_longer_than_the_time_out(service: Service) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        for _ in range(5):
            say(mailbox, request_id, "", 0)
            time.sleep(0.8)
        mailbox.answer(request_id, ENDED)

    with service.answering(act):
        answer = service.ask()
    assert (answer.status_code, answer.json()["output"]) == (200, ENDED["output"])


@pytest.mark.slow
@pytest.mark.parametrize("timeout_seconds", [3.0])
def test_a_stream_with_news_may_last_longer_than_the_time_out(service: Service) -> None:
    def act(mailbox: Mailbox, request_id: str) -> None:
        for number in range(5):
            say(mailbox, request_id, f"{number}", number)
            time.sleep(0.8)
        mailbox.answer(request_id, {**ENDED, "output": "01234"})

    with service.answering(act):
        found = service.events()
    assert found[-1][0] == "done"


@pytest.mark.parametrize("timeout_seconds", [0.7])
@pytest.mark.parametrize("streams", [False, True])
def test_silence_beyond_the_time_out_ends_the_wait_and_the_work(
    service: Service, streams: bool
) -> None:
    ended: list[bool] = []

    def act(mailbox: Mailbox, request_id: str) -> None:
        if streams:
            say(mailbox, request_id, "one", 0)
        ended.append(was_cancelled(mailbox, request_id))

    with service.answering(act):
        if streams:
            found = service.events()
            assert (found[-1][0], found[-1][1]["code"]) == ("error", "inference_timeout")
        else:
            answer = service.ask()
            assert (answer.status_code, answer.json()["code"]) == (503, "inference_timeout")
    assert ended == [True]


def was_cancelled(mailbox: Mailbox, request_id: str) -> bool:
    """Go on answering until the caller is known to be gone."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if mailbox.is_cancelled(request_id):
            return True
        mailbox.renew([request_id])
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("talkative", [False, True])
def test_a_caller_who_goes_away_cancels_the_request(
    service: Service, streams: bool, talkative: bool
) -> None:
    ended: list[bool] = []

    def act(mailbox: Mailbox, request_id: str) -> None:
        deadline, number = time.monotonic() + 60, 0
        say(mailbox, request_id, "x", 0)
        while not mailbox.is_cancelled(request_id) and time.monotonic() < deadline:
            mailbox.renew([request_id])
            if talkative:
                number += 1
                say(mailbox, request_id, "x", number)
            time.sleep(0.05)
        ended.append(mailbox.is_cancelled(request_id))

    with service.answering(act):
        if streams:
            with service.stream() as response:
                next(events_of(response.iter_lines()))
        else:
            with pytest.raises(httpx.ReadTimeout):
                service.http.post(
                    "/infer",
                    json={"model": MODEL, "prompt": "x"},
                    timeout=httpx.Timeout(5, read=1.5),
                )
    assert ended == [True]


@pytest.mark.parametrize("streams", [False, True])
def test_a_full_queue_says_when_to_come_again(service: Service, streams: bool) -> None:
    mailbox = Mailbox(service.settings)
    mailbox.submit("inf_first", device="cpu", team="alpha", payload={})
    answer = service.ask(stream=streams)
    assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
    assert int(answer.headers["Retry-After"]) >= 1
    assert "'alpha'" in answer.json()["detail"]
    measures = service.http.get("/metrics").text
    assert 'grit_inference_waiting{device="cpu"} 1.0' in measures
    mailbox.close_sync()


def test_a_stream_takes_a_place_and_gives_it_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.inference, "PLACES", Places(1))
    refused: list[httpx.Response] = []

    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one", 0)
        refused.append(service.ask())
        mailbox.answer(request_id, ENDED)

    with service.answering(act):
        assert service.events()[-1][0] == "done"
    assert (refused[0].status_code, refused[0].json()["code"]) == (429, "too_many_waiting")
    with service.answering(lambda mailbox, one: mailbox.answer(one, ENDED)):
        assert service.ask().status_code == 200


def test_silence_is_filled_with_comments(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.routes.infer, "HEARTBEAT_SECONDS", 0.05)

    def act(mailbox: Mailbox, request_id: str) -> None:
        say(mailbox, request_id, "one", 0)
        time.sleep(0.4)
        mailbox.answer(request_id, ENDED)

    with service.answering(act):
        kinds = [kind for kind, _ in service.events()]
    assert kinds.count(": keep-alive") >= 1
    assert [kind for kind in kinds if not kind.startswith(":")] == ["delta", "delta", "done"]


def test_a_source_is_closed_when_its_reader_is_cancelled() -> None:
    closed: list[bool] = []

    async def source() -> AsyncGenerator[int]:
        try:
            await asyncio.sleep(60)
            yield 1
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(0.05)
            closed.append(True)

    async def scene() -> None:
        items = source()
        async with aclosing(items):  # as an answer does: it must be free by then
            with anyio.move_on_after(0.05):
                async with aclosing(kept_alive(items, silence_seconds=60)) as kept:
                    await anext(kept)

    asyncio.run(scene())
    assert closed == [True]


def test_a_source_is_closed_with_the_reader_who_waits_for_it() -> None:
    closed: list[bool] = []

    async def source() -> AsyncGenerator[int]:
        try:
            yield 1
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def scene() -> None:
        async with aclosing(kept_alive(source(), silence_seconds=0.01)) as items:
            assert await anext(items) == 1
            assert await anext(items) is None

    asyncio.run(scene())
    assert closed == [True]
