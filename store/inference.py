"""The mailbox between `POST /infer` and the worker: requests and answers in Redis, for a while.

The messages of an answer are any number of `{"delta": text, "at": characters before it}` and then
a last one, `{"output": ...}` or `{"error": ...}`. A connection that broke may leave a message there
twice; `at` tells.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import weakref
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, cast

from store.errors import QueueUnavailable
from store.fair_queue import FairQueue
from store.queue import Doorbell

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import redis
    import redis.asyncio

    from store.settings import Settings

_BLOCK_SECONDS: Final = 2.0
_CONNECT_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 5.0
_MAX_CONNECTIONS: Final = 4096
"""Everybody who waits holds one; the client's own bound of 100 would turn the others away."""


class Mailbox:
    """Passes inference requests to a worker and its answers back. Safe to share between threads."""

    def __init__(self, settings: Settings, *, doorbell: Doorbell | None = None) -> None:
        """Prepare the connections; nothing is connected yet."""
        self._settings = settings
        self._doorbell = doorbell or Doorbell(settings)
        self._keep_seconds = settings.infer_keep_seconds
        # A connection belongs to the event loop that opened it.
        self._async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, redis.asyncio.Redis] = (
            weakref.WeakKeyDictionary()
        )

    @cached_property
    def _sync(self) -> redis.Redis:
        # Imported when a mailbox is first used, so that the API starts without it.
        import redis  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.retry import Retry  # noqa: PLC0415

        return redis.Redis.from_url(
            self._settings.broker_url,
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_timeout=_ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 1),
            max_connections=_MAX_CONNECTIONS,
        )

    @cached_property
    def _queue(self) -> FairQueue:
        return FairQueue(self._sync, prefix=self._key_prefix)

    def submit(self, request_id: str, *, device: str, team: str, payload: dict[str, Any]) -> None:
        """Let a request wait for its team's turn, and ring the device's inference queue.

        A bell that is not heard delays the request by a second or so: workers look by themselves.

        Raises:
            QueueFull: If as many requests wait already as may, in all or of this team.
            QueueUnavailable: If the broker does not answer.
        """
        settings = self._settings
        with _reachable():
            self._queue.put(
                request_id,
                _encode(payload),
                device=device,
                team=team,
                # Afterwards nobody waits for it any more.
                keep_seconds=math.ceil(settings.infer_timeout_seconds) + 1,
                max_waiting=settings.infer_max_waiting,
                max_waiting_per_team=settings.infer_max_waiting_per_team,
            )
        self._doorbell.ring_infer(request_id, device=device)

    def take_next(self, device: str) -> dict[str, Any] | None:
        """Take the request whose turn it is, for one worker only; none if nothing waits.

        The payload's `id` says which one. The worker says that it lives with `renew`, at least
        every `infer_lost_seconds`.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        with _reachable():
            taken = self._queue.take(device=device, lost_seconds=self._settings.infer_lost_seconds)
        if taken is None:
            return None
        return {**cast("dict[str, Any]", json.loads(taken.payload)), "id": taken.id}

    def renew(self, request_ids: Collection[str]) -> None:
        """Say that these requests are still being answered; one that has ended stays ended.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        with _reachable(), self._sync.pipeline(transaction=False) as all_of_them:
            for request_id in request_ids:
                key = self._key("running", request_id)
                all_of_them.expire(key, self._settings.infer_lost_seconds)
            all_of_them.execute()

    def finish(self, request_id: str) -> None:
        """Say that a request is no longer being answered; its last message says so too.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        with _reachable():
            self._sync.delete(self._key("running", request_id))

    def answer(self, request_id: str, message: dict[str, Any]) -> None:
        """Append a message to a request's answer: a `delta`, or the last one of all.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        key = self._key("answer", request_id)
        with _reachable(), self._sync.pipeline(transaction=True) as both:
            both.rpush(key, _encode(message))
            both.expire(key, self._keep_seconds)
            if "delta" not in message:
                both.delete(self._key("running", request_id))
            both.execute()

    def wait(self, request_id: str, *, timeout_seconds: float) -> dict[str, Any] | None:
        """Return the next message of an answer; none after the timeout.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        key = self._key("answer", request_id)
        deadline = time.monotonic() + timeout_seconds
        with _reachable():
            while (left := deadline - time.monotonic()) > 0:
                found = self._sync.blpop([key], timeout=_block_seconds(left))
                if found is not None:
                    return _decode(cast("list[bytes]", found)[1])
        return None

    async def wait_async(self, request_id: str, *, timeout_seconds: float) -> dict[str, Any] | None:
        """As `wait`, without holding a thread.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        key = self._key("answer", request_id)
        deadline = time.monotonic() + timeout_seconds
        client = self._client_of_loop()
        with _reachable():
            while (left := deadline - time.monotonic()) > 0:
                found = await client.blpop([key], timeout=_block_seconds(left))
                if found is not None:
                    return _decode(cast("list[bytes]", found)[1])
        return None

    def cancel(self, request_id: str) -> None:
        """Drop a request that nobody waits for any more; `is_cancelled` becomes true.

        A broker that does not answer is left alone: what it keeps expires by itself.
        """
        from redis.exceptions import RedisError  # noqa: PLC0415 - as in _sync

        try:
            with self._sync.pipeline(transaction=True) as both:
                both.delete(self._key("request", request_id))
                both.set(self._key("cancelled", request_id), b"1", ex=self._keep_seconds)
                both.execute()
        except (RedisError, OSError):
            return

    def cancelled(self, request_ids: Sequence[str]) -> set[str]:
        """Return those whose caller went away, in one round trip for all.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        if not request_ids:
            return set()
        with _reachable():
            marks = self._sync.mget([self._key("cancelled", each) for each in request_ids])
        found = zip(request_ids, cast("list[bytes | None]", marks), strict=True)
        return {request_id for request_id, mark in found if mark is not None}

    def is_cancelled(self, request_id: str) -> bool:
        """Tell whether the caller went away.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        return bool(self.cancelled([request_id]))

    def is_lost(self, request_id: str) -> bool:
        """Tell whether a request neither waits, nor is being answered, nor has been.

        Its worker died, or it expired before its turn. An answer that was read to its end looks
        the same: ask while there is more to come.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        with _reachable():
            return not self._sync.exists(*self._traces(request_id))

    async def is_lost_async(self, request_id: str) -> bool:
        """As `is_lost`, without holding a thread.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        with _reachable():
            return not await self._client_of_loop().exists(*self._traces(request_id))

    def num_waiting(self, device: str) -> int:
        """Count the requests that wait for the workers of a device.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        with _reachable():
            return self._queue.num_waiting(device)

    def ping(self) -> None:
        """Ask the broker for an answer, for readiness.

        Raises:
            QueueUnavailable: If it gives none.
        """
        with _reachable():
            self._sync.ping()

    async def close(self) -> None:
        """Close the connections of the running event loop and the others."""
        client = self._async.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()
        self.close_sync()

    def close_sync(self) -> None:
        """Close the connections that belong to no event loop."""
        self._sync.close()
        self._doorbell.close()

    @property
    def _key_prefix(self) -> str:
        return f"{self._settings.queue_prefix}infer:"

    def _key(self, kind: str, request_id: str) -> str:
        return f"{self._key_prefix}{kind}:{request_id}"

    def _traces(self, request_id: str) -> list[str]:
        return [self._key(kind, request_id) for kind in ("request", "running", "answer")]

    def _client_of_loop(self) -> redis.asyncio.Redis:
        loop = asyncio.get_running_loop()
        client = self._async.get(loop)
        if client is None:
            import redis.asyncio  # noqa: PLC0415 - as in _sync
            from redis.asyncio.retry import Retry as AsyncRetry  # noqa: PLC0415
            from redis.backoff import NoBackoff  # noqa: PLC0415

            client = redis.asyncio.Redis.from_url(
                self._settings.broker_url,
                socket_connect_timeout=_CONNECT_SECONDS,
                socket_timeout=_ANSWER_SECONDS,
                retry=AsyncRetry(NoBackoff(), 1),
                max_connections=_MAX_CONNECTIONS,
            )
            self._async[loop] = client
        return client


def _block_seconds(left: float) -> float:
    # In slices: a broker that went away is noticed between them. Zero would block for ever.
    return min(_BLOCK_SECONDS, max(0.01, math.ceil(left * 1000) / 1000))


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode()


def _decode(raw: object) -> dict[str, Any] | None:
    return None if raw is None else cast("dict[str, Any]", json.loads(cast("bytes", raw)))


@contextmanager
def _reachable() -> Iterator[None]:
    """Say in our own words that the broker does not answer.

    Raises:
        QueueUnavailable: If it does not.
    """
    from redis.exceptions import RedisError  # noqa: PLC0415 - as in Mailbox._sync

    try:
        yield
    except (RedisError, OSError) as error:
        raise QueueUnavailable(
            f"The message broker does not answer ({type(error).__name__}); try again in a moment."
        ) from error
