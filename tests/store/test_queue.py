"""The doorbell and the mailbox against a real Valkey, and against brokers that are ill."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from store.errors import QueueUnavailable
from store.inference import Mailbox
from store.queue import CLAIM_TASK, INFER_TASK, REGISTER_MODELS_TASK, Doorbell
from store.settings import Settings
from tests.ports import reserve_port
from tests.services import running_valkey


@pytest.fixture
def client(valkey: str) -> Iterator[redis.Redis]:
    made = redis.Redis.from_url(valkey)
    yield made
    made.close()


@pytest.fixture
def doorbell(embedded_settings: Settings) -> Iterator[Doorbell]:
    made = Doorbell(embedded_settings)
    yield made
    made.close()


@pytest.fixture
def mailbox(embedded_settings: Settings) -> Iterator[Mailbox]:
    made = Mailbox(embedded_settings)
    yield made
    made.close_sync()


def _messages(client: redis.Redis, prefix: str, queue: str) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in client.lrange(f"{prefix}{queue}", 0, -1)]


def test_a_bell_names_a_queue_and_nothing_else(
    doorbell: Doorbell, client: redis.Redis, queue_prefix: str
) -> None:
    assert doorbell.ring("cpu")
    [message] = _messages(client, queue_prefix, "cpu")
    assert message["headers"]["task"] == CLAIM_TASK
    assert message["content-type"] == "application/json"
    assert message["headers"]["argsrepr"] == "['cpu']"
    assert not _messages(client, "", "cpu")


def test_models_ring_on_the_queues_that_workers_serve_and_on_no_other(
    doorbell: Doorbell, client: redis.Redis, queue_prefix: str
) -> None:
    assert doorbell.ring_models(["cuda", "infer.cpu"])
    for queue in ("cuda", "infer.cpu"):
        [message] = _messages(client, queue_prefix, queue)
        assert message["headers"]["task"] == REGISTER_MODELS_TASK
    assert _messages(client, queue_prefix, "infer.cuda") == []


def _ill_brokers() -> Iterator[tuple[str, Settings, socket.socket | None]]:
    yield "closed", Settings(broker_url=f"redis://127.0.0.1:{reserve_port()}/0"), None
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen(16)
    yield "silent", Settings(broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0"), silent


def test_ringing_an_ill_broker_neither_raises_nor_waits_long() -> None:
    for name, settings, held in _ill_brokers():
        doorbell = Doorbell(settings)
        for _ in range(2):
            began = time.monotonic()
            assert not doorbell.ring("cpu"), name
            assert time.monotonic() - began < 5, name  # and not for as long as a socket waits
        if held is not None:
            held.close()


def test_a_bell_rings_again_after_the_broker_was_restarted(tmp_path: Path) -> None:
    port = reserve_port()
    settings = Settings(broker_url=f"redis://127.0.0.1:{port}/0")
    doorbell = Doorbell(settings)
    with running_valkey(port=port, folder=tmp_path):
        assert doorbell.ring("cpu")
    assert not doorbell.ring("cpu")
    with running_valkey(port=port, folder=tmp_path) as url:
        assert doorbell.ring("cpu")
        client = redis.Redis.from_url(url)
        assert len(_messages(client, settings.queue_prefix, "cpu")) == 2  # the first one was kept
        client.close()
        doorbell.close()


def test_a_closed_doorbell_leaves_the_others_of_its_process_ringing(
    doorbell: Doorbell, embedded_settings: Settings
) -> None:
    assert doorbell.ring("cpu")
    other = Doorbell(embedded_settings)
    assert other.ring("cpu")
    other.close()
    assert doorbell.ring("cpu")
    assert other.ring("cpu")
    other.close()


def test_many_threads_ring_with_one_doorbell(
    doorbell: Doorbell, client: redis.Redis, queue_prefix: str
) -> None:
    taken: list[bool] = []
    threads = [
        threading.Thread(target=lambda: taken.extend(doorbell.ring("cpu") for _ in range(5)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [True] * 30
    assert len(_messages(client, queue_prefix, "cpu")) == 30


def test_a_request_is_taken_by_one_worker_and_its_answer_comes_back(
    mailbox: Mailbox, client: redis.Redis, queue_prefix: str
) -> None:
    mailbox.submit(
        "inf_1", device="cpu", team="a", payload={"prompt": "é", "images": ["x" * 100_000]}
    )
    [message] = _messages(client, queue_prefix, "infer.cpu")
    assert message["headers"]["task"] == INFER_TASK
    assert "xxx" not in json.dumps(message)
    taken = mailbox.take_next("cpu")
    assert taken is not None
    assert (taken["id"], taken["prompt"]) == ("inf_1", "é")
    assert mailbox.take_next("cpu") is None
    mailbox.answer("inf_1", {"delta": "a"})
    mailbox.answer("inf_1", {"done": True})
    assert mailbox.wait("inf_1", timeout_seconds=60) == {"delta": "a"}
    assert asyncio.run(_wait(mailbox, "inf_1")) == {"done": True}
    assert mailbox.wait("inf_1", timeout_seconds=0.05) is None
    assert asyncio.run(_wait(mailbox, "inf_1", timeout_seconds=0.05)) is None


async def _wait(
    mailbox: Mailbox, request_id: str, *, timeout_seconds: float = 60.0
) -> dict[str, Any] | None:
    try:
        return await mailbox.wait_async(request_id, timeout_seconds=timeout_seconds)
    finally:
        await mailbox.close()


def test_many_waiters_each_get_their_own_answer_without_a_thread_each(mailbox: Mailbox) -> None:
    async def scene() -> list[dict[str, Any] | None]:
        waiting = [
            asyncio.create_task(mailbox.wait_async(f"inf_{number}", timeout_seconds=60))
            for number in range(20)
        ]
        await asyncio.sleep(0.1)
        for number in range(20):
            await asyncio.to_thread(mailbox.answer, f"inf_{number}", {"number": number})
        try:
            return list(await asyncio.gather(*waiting))
        finally:
            await mailbox.close()

    assert asyncio.run(scene()) == [{"number": number} for number in range(20)]


def test_a_cancelled_request_is_gone_and_known_to_be_cancelled(mailbox: Mailbox) -> None:
    mailbox.submit("inf_1", device="cpu", team="a", payload={})
    assert not mailbox.is_cancelled("inf_1")
    mailbox.cancel("inf_1")
    assert mailbox.is_cancelled("inf_1")
    assert mailbox.take_next("cpu") is None


def test_an_ill_broker_is_an_error_of_ours_and_soon() -> None:
    settings = Settings(broker_url=f"redis://127.0.0.1:{reserve_port()}/0")
    mailbox = Mailbox(settings)
    began = time.monotonic()
    for ask in (
        lambda: mailbox.submit("inf_1", device="cpu", team="a", payload={}),
        lambda: mailbox.take_next("cpu"),
        lambda: mailbox.renew(["inf_1"]),
        lambda: mailbox.finish("inf_1"),
        lambda: mailbox.is_lost("inf_1"),
        lambda: mailbox.num_waiting("cpu"),
        lambda: mailbox.answer("inf_1", {}),
        lambda: mailbox.wait("inf_1", timeout_seconds=1),
        lambda: mailbox.is_cancelled("inf_1"),
        lambda: asyncio.run(_wait(mailbox, "inf_1")),
        mailbox.ping,
    ):
        with pytest.raises(QueueUnavailable, match="broker"):
            ask()
    mailbox.cancel("inf_1")
    assert time.monotonic() - began < 2.0
