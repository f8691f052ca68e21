"""The fair mailbox against a real Valkey: turns, bounds, expiry, and what a dead worker leaves."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from store.errors import QueueFull
from store.inference import Mailbox
from store.settings import Settings

Open = Callable[..., Mailbox]


@pytest.fixture
def open_mailbox(embedded_settings: Settings) -> Iterator[Open]:
    """Make a mailbox whose settings are changed as given."""
    made: list[Mailbox] = []

    def make(**changes: Any) -> Mailbox:
        made.append(Mailbox(embedded_settings.model_copy(update=changes)))
        return made[-1]

    yield make
    for mailbox in made:
        mailbox.close_sync()


@pytest.fixture
def mailbox(open_mailbox: Open) -> Mailbox:
    return open_mailbox()


@pytest.fixture
def client(valkey: str) -> Iterator[redis.Redis]:
    made = redis.Redis.from_url(valkey)
    yield made
    made.close()


def put(mailbox: Mailbox, request_id: str, team: str = "a", *, device: str = "cpu") -> None:
    mailbox.submit(request_id, device=device, team=team, payload={"team": team})


def take_all(mailbox: Mailbox, *, device: str = "cpu") -> list[str]:
    found = []
    while (taken := mailbox.take_next(device)) is not None:
        found.append(taken["id"])
    return found


def test_a_teams_requests_are_taken_in_their_order_and_once(mailbox: Mailbox) -> None:
    for name in ("one", "two", "three"):
        put(mailbox, name)
    assert take_all(mailbox) == ["one", "two", "three"]
    assert mailbox.take_next("cpu") is None


def test_teams_take_turns(mailbox: Mailbox) -> None:
    for name in ("a1", "a2", "a3", "b1", "c1", "c2"):
        put(mailbox, name, name[0])
    assert take_all(mailbox) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_fifty_waiting_requests_of_a_team_delay_another_teams_one_by_one_at_most(
    mailbox: Mailbox,
) -> None:
    for number in range(50):
        put(mailbox, f"a{number}", "a")
    assert mailbox.take_next("cpu") is not None
    put(mailbox, "b", "b")
    following = [mailbox.take_next("cpu"), mailbox.take_next("cpu")]
    assert "b" in [taken["id"] for taken in following if taken]
    assert mailbox.num_waiting("cpu") == 48


def test_devices_have_queues_of_their_own(mailbox: Mailbox) -> None:
    put(mailbox, "one", device="cpu")
    put(mailbox, "two", device="cuda")
    assert take_all(mailbox, device="cuda") == ["two"]
    assert take_all(mailbox, device="cpu") == ["one"]


def test_many_threads_take_each_request_once(mailbox: Mailbox) -> None:
    for number in range(60):
        put(mailbox, f"{number}", f"team {number % 3}")
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.extend(take_all(mailbox))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=int) == [str(number) for number in range(60)]


def test_a_team_beyond_its_bound_is_refused_and_the_others_are_not(open_mailbox: Open) -> None:
    mailbox = open_mailbox(infer_max_waiting_per_team=2)
    put(mailbox, "a1", "a")
    put(mailbox, "a2", "a")
    with pytest.raises(QueueFull, match=r"2 requests of team 'a' .* at most 2") as refused:
        put(mailbox, "a3", "a")
    assert refused.value.retry_after_seconds >= 1
    put(mailbox, "b1", "b")
    assert take_all(mailbox) == ["a1", "b1", "a2"]


def test_beyond_the_bound_of_all_every_team_is_refused(open_mailbox: Open) -> None:
    mailbox = open_mailbox(infer_max_waiting=3)
    for name in ("a1", "b1", "c1"):
        put(mailbox, name, name[0])
    with pytest.raises(QueueFull, match=r"3 requests of all teams .* at most 3"):
        put(mailbox, "d1", "d")
    put(mailbox, "d1", "d", device="mps")  # the bound is a device's
    assert mailbox.take_next("cpu") is not None
    put(mailbox, "d2", "d")
    assert take_all(mailbox) == ["b1", "c1", "d2"]


def test_a_cancelled_request_is_skipped_and_makes_room(open_mailbox: Open) -> None:
    mailbox = open_mailbox(infer_max_waiting_per_team=2, infer_max_waiting=2)
    put(mailbox, "gone")
    put(mailbox, "kept")
    mailbox.cancel("gone")
    put(mailbox, "new")
    assert mailbox.num_waiting("cpu") == 2
    assert take_all(mailbox) == ["kept", "new"]
    assert mailbox.num_waiting("cpu") == 0


def test_cancelling_all_of_a_team_makes_room_for_the_others(open_mailbox: Open) -> None:
    mailbox = open_mailbox(infer_max_waiting=2)
    put(mailbox, "a1", "a")
    put(mailbox, "a2", "a")
    mailbox.cancel("a1")
    mailbox.cancel("a2")
    put(mailbox, "b1", "b")
    put(mailbox, "a3", "a")
    assert take_all(mailbox) == ["b1", "a3"]


@pytest.mark.slow
def test_an_expired_request_is_skipped_and_makes_room(open_mailbox: Open) -> None:
    brief = open_mailbox(infer_timeout_seconds=0.01)
    patient = open_mailbox(infer_max_waiting_per_team=2)
    put(brief, "expires")
    put(patient, "stays")
    time.sleep(2.1)  # the broker keeps the first one for two seconds
    put(patient, "new")
    assert take_all(patient) == ["stays", "new"]


def test_a_list_that_expired_leaves_its_team_one_turn_and_not_two(
    mailbox: Mailbox, client: redis.Redis, queue_prefix: str
) -> None:
    put(mailbox, "a1", "a")
    put(mailbox, "b1", "b")
    client.delete(f"{queue_prefix}infer:waiting:cpu:a")
    for name in ("a2", "a3", "b2"):
        put(mailbox, name, name[0])
    assert take_all(mailbox) == ["b1", "a2", "b2", "a3"]


def test_everything_in_the_mailbox_expires(
    mailbox: Mailbox, client: redis.Redis, queue_prefix: str, embedded_settings: Settings
) -> None:
    for name in ("one", "two", "three"):
        put(mailbox, name)
    mailbox.take_next("cpu")
    mailbox.answer("one", {"delta": "x"})
    mailbox.cancel("three")
    longest = embedded_settings.infer_keep_seconds
    kept = {key: client.ttl(key) for key in client.keys(f"{queue_prefix}infer:*")}
    kinds = {key.decode().removeprefix(f"{queue_prefix}infer:").partition(":")[0] for key in kept}
    assert kinds == {"request", "waiting", "teams", "running", "answer", "cancelled"}
    assert all(0 < left <= longest for left in kept.values()), kept
    timeout = math.ceil(embedded_settings.infer_timeout_seconds) + 1
    assert kept[f"{queue_prefix}infer:request:two".encode()] <= timeout


@pytest.mark.slow
def test_a_request_is_lost_once_its_worker_is_silent(open_mailbox: Open) -> None:
    mailbox = open_mailbox(infer_lost_seconds=3)
    put(mailbox, "one")
    assert not mailbox.is_lost("one")  # it waits
    mailbox.take_next("cpu")
    for _ in range(4):
        time.sleep(1)
        mailbox.renew(["one"])
        assert not mailbox.is_lost("one")
    deadline = time.monotonic() + 60
    while not mailbox.is_lost("one"):
        assert time.monotonic() < deadline
        time.sleep(0.1)

    async def ask() -> bool:
        try:
            return await mailbox.is_lost_async("one")
        finally:
            await mailbox.close()

    assert asyncio.run(ask())


def test_an_answered_request_is_not_lost_but_one_given_up_is(mailbox: Mailbox) -> None:
    put(mailbox, "one")
    put(mailbox, "two")
    assert len(take_all(mailbox)) == 2
    mailbox.answer("one", {"output": "x"})
    assert not mailbox.is_lost("one")
    mailbox.finish("two")
    mailbox.renew(["two"])  # as a thread may that has not heard of it
    assert mailbox.is_lost("two")


def test_only_the_last_message_ends_what_is_running(
    mailbox: Mailbox, client: redis.Redis, queue_prefix: str
) -> None:
    put(mailbox, "one")
    mailbox.take_next("cpu")
    mailbox.answer("one", {"delta": "x"})
    assert client.exists(f"{queue_prefix}infer:running:one")
    mailbox.answer("one", {"output": "x"})
    assert not client.exists(f"{queue_prefix}infer:running:one")


def test_the_cancelled_ones_of_many_are_told_at_once(mailbox: Mailbox) -> None:
    mailbox.cancel("two")
    assert mailbox.cancelled(["one", "two", "three"]) == {"two"}
    assert mailbox.cancelled([]) == set()


def test_a_bell_that_is_not_taken_leaves_the_request_waiting(embedded_settings: Settings) -> None:
    class Deaf:
        """A doorbell whose wire is cut."""

        def ring_infer(self, _request_id: str, *, device: str) -> bool:  # noqa: ARG002
            return False

        def close(self) -> None: ...

    mailbox = Mailbox(embedded_settings, doorbell=Deaf())  # type: ignore[arg-type] # its two uses
    put(mailbox, "one")
    assert take_all(mailbox) == ["one"]
    mailbox.close_sync()


def test_more_than_a_hundred_may_wait_at_once(mailbox: Mailbox) -> None:
    async def scene() -> list[dict[str, Any] | None]:
        waiting = [
            asyncio.create_task(mailbox.wait_async(f"{number}", timeout_seconds=10))
            for number in range(130)
        ]
        await asyncio.sleep(0.3)
        for number in range(130):
            await asyncio.to_thread(mailbox.answer, f"{number}", {"number": number})
        try:
            return list(await asyncio.gather(*waiting))
        finally:
            await mailbox.close()

    assert asyncio.run(scene()) == [{"number": number} for number in range(130)]
