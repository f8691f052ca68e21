"""Token buckets in a real broker, shared by several processes' worth of clients."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

import pytest

from store.errors import QueueUnavailable
from store.rates import Bucket, Buckets, Grant
from store.settings import Settings

PATIENT = 5.0
"""Of tests on a busy machine; the service itself waits for a tenth of a second."""


@pytest.fixture
def settings(valkey: str, queue_prefix: str) -> Settings:
    return Settings(broker_url=valkey, queue_prefix=queue_prefix)


def run(settings: Settings, *works: Callable[[Buckets], Awaitable[list[Grant]]]) -> list[Grant]:
    """Run each work with connections of its own, at once, and return what all were given."""

    async def one(work: Callable[[Buckets], Awaitable[list[Grant]]]) -> list[Grant]:
        buckets = Buckets(settings, patience_seconds=PATIENT)
        try:
            return await work(buckets)
        finally:
            await buckets.close()

    async def everything() -> list[Grant]:
        found = await asyncio.gather(*(one(work) for work in works))
        return [grant for grants in found for grant in grants]

    return asyncio.run(everything())


def taking(times: int, *asked: Bucket) -> Callable[[Buckets], Awaitable[list[Grant]]]:
    async def work(buckets: Buckets) -> list[Grant]:
        return [await buckets.take(asked) for _ in range(times)]

    return work


def test_a_full_bucket_gives_a_minutes_worth_and_says_when_to_come_again(
    settings: Settings,
) -> None:
    bucket = Bucket("k", 5)
    grants = run(settings, taking(7, bucket))
    assert [grant.tokens for grant in grants] == [1] * 5 + [0] * 2
    assert grants[-1].bucket == bucket
    assert 10 < grants[-1].wait_seconds <= 12  # 60 / 5, less the time that passed


def test_processes_that_share_a_bucket_get_no_more_together(settings: Settings) -> None:
    bucket = Bucket("k", 600)  # ten a time
    began = time.monotonic()
    grants = run(settings, *(taking(30, bucket) for _ in range(4)))
    given = sum(grant.tokens for grant in grants)
    # Ten a second come back meanwhile.
    assert 600 <= given <= 600 + 10 * (time.monotonic() - began + 1)


def test_a_bucket_fills_as_time_passes(settings: Settings) -> None:
    bucket = Bucket("k", 120)  # two a second

    async def work(buckets: Buckets) -> list[Grant]:
        while (await buckets.take([bucket])).tokens:
            pass
        await asyncio.sleep(0.6)
        return [await buckets.take([bucket])]

    assert run(settings, work)[0].tokens >= 1


def test_the_emptiest_bucket_decides_and_the_others_lose_nothing(settings: Settings) -> None:
    small, large = Bucket("small", 3), Bucket("large", 60)
    grants = run(settings, taking(5, large, small))
    assert [grant.tokens for grant in grants] == [1, 1, 1, 0, 0]
    assert grants[-1].bucket == small
    alone = run(settings, taking(60, large))
    assert sum(grant.tokens for grant in alone) >= 57


def test_a_lower_rate_applies_to_a_bucket_that_was_fuller(settings: Settings) -> None:
    run(settings, taking(1, Bucket("k", 600)))
    grants = run(settings, taking(4, Bucket("k", 2)))
    assert [grant.tokens for grant in grants] == [1, 1, 0, 0]


def test_what_the_broker_keeps_of_a_bucket_expires(settings: Settings) -> None:
    run(settings, taking(1, Bucket("k", 5)))

    async def ttl() -> int:
        import redis.asyncio  # noqa: PLC0415 - of this test alone

        client = redis.asyncio.Redis.from_url(settings.broker_url)
        found = await client.ttl(f"{settings.queue_prefix}rate:k")
        await client.aclose()
        return int(found)

    assert 0 < asyncio.run(ttl()) <= 120


def test_a_broker_that_is_away_or_silent_is_not_waited_for() -> None:
    async def ask(url: str) -> float:
        buckets = Buckets(Settings(broker_url=url), patience_seconds=0.1)
        with pytest.raises(QueueUnavailable):  # the client's modules are imported by now
            await buckets.take([Bucket("k", 5)])
        started = time.monotonic()
        with pytest.raises(QueueUnavailable):
            await buckets.take([Bucket("k", 5)])
        await buckets.close()
        return time.monotonic() - started

    assert asyncio.run(ask("redis://127.0.0.1:1/0")) < 1
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert 0.05 < asyncio.run(ask(f"redis://127.0.0.1:{port}/0")) < 1
