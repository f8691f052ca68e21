"""Looking after the requests in progress, against a real Valkey."""

import time
from collections.abc import Iterator

import pytest
import redis

from store.inference import Mailbox
from store.settings import Settings
from tests.ports import reserve_port
from worker.running import RunningRequests


@pytest.fixture
def mailbox(embedded_settings: Settings) -> Iterator[Mailbox]:
    made = Mailbox(embedded_settings.model_copy(update={"infer_lost_seconds": 1}))
    yield made
    made.close_sync()


def take(mailbox: Mailbox, request_id: str) -> None:
    mailbox.submit(request_id, device="cpu", team="a", payload={})
    assert mailbox.take_next("cpu") is not None


@pytest.mark.slow
def test_a_request_is_alive_for_as_long_as_it_runs(mailbox: Mailbox) -> None:
    running = RunningRequests(mailbox, lost_seconds=3)
    running.start()
    take(mailbox, "one")
    with running.one("one"):
        time.sleep(4)
        assert not mailbox.is_lost("one")
    deadline = time.monotonic() + 60
    while not mailbox.is_lost("one"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.stop()


def test_those_whose_caller_went_away_are_marked_and_only_those(mailbox: Mailbox) -> None:
    running = RunningRequests(mailbox, lost_seconds=10)
    with running.one("one") as one, running.one("two") as two:
        mailbox.cancel("two")
        running.look()
        assert (one.cancelled, two.cancelled) == (False, True)


def test_many_requests_cost_one_look(mailbox: Mailbox, valkey: str) -> None:
    client = redis.Redis.from_url(valkey)
    running = RunningRequests(mailbox, lost_seconds=10)
    running.look()  # connects
    names = [f"inf_{number}" for number in range(50)]
    held = [running.one(name) for name in names]
    for one in held:
        one.__enter__()
    calls = "cmdstat_mget"
    before = client.info("commandstats").get(calls, {"calls": 0})["calls"]
    running.look()
    assert client.info("commandstats")[calls]["calls"] == before + 1
    for one in held:
        one.__exit__(None, None, None)
    client.close()


def test_a_silent_broker_marks_nobody() -> None:
    mailbox = Mailbox(Settings(broker_url=f"redis://127.0.0.1:{reserve_port()}/0"))
    running = RunningRequests(mailbox, lost_seconds=10)
    running.start()
    with running.one("one") as one:
        time.sleep(0.5)
        assert not one.cancelled
    running.stop()
    mailbox.close_sync()
