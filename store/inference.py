"""The mailbox between `POST /infer` and the worker: requests and answers in Redis, for a while."""

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
from store.queue import Doorbell

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis
    import redis.asyncio

    from store.settings import Settings

_BLOCK_SECONDS: Final = 2.0
_CONNECT_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 5.0


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
        )

    def submit(self, request_id: str, *, device: str, payload: dict[str, Any]) -> None:
        """Store a request and ring the device's inference queue.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        with _reachable():
            self._sync.set(
                self._key("request", request_id), _encode(payload), ex=self._keep_seconds
            )
        if not self._doorbell.ring_infer(request_id, device=device):
            self.cancel(request_id)
            raise QueueUnavailable("The broker did not take the request; try again in a moment.")

    def take(self, request_id: str) -> dict[str, Any] | None:
        """Take a request out of the mailbox, for one worker only; none if it is gone or expired.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        with _reachable():
            return _decode(self._sync.getdel(self._key("request", request_id)))

    def answer(self, request_id: str, message: dict[str, Any]) -> None:
        """Append a message to a request's answer: the whole one, or a part of a stream.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        key = self._key("answer", request_id)
        with _reachable(), self._sync.pipeline(transaction=True) as both:
            both.rpush(key, _encode(message))
            both.expire(key, self._keep_seconds)
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

    def is_cancelled(self, request_id: str) -> bool:
        """Tell whether the caller went away.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        with _reachable():
            return bool(self._sync.exists(self._key("cancelled", request_id)))

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

    def _key(self, kind: str, request_id: str) -> str:
        return f"{self._settings.queue_prefix}infer:{kind}:{request_id}"

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
