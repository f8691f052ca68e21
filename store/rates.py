"""Token buckets in the broker, so that several API processes share one limit.

A bucket holds at most as many tokens as its rate gives in a minute, and is full at first. One Lua
script fills the buckets of a request for the time that passed on the broker's clock, and takes
tokens from all of them or from none. Processes take a few at a time (`Bucket.block`): a second's
worth, so that most requests ask nobody.
"""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from anyio import to_thread

from store.errors import QueueUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis.asyncio

    from store.settings import Settings

WINDOW_SECONDS: Final = 60
_PATIENCE_SECONDS: Final = 0.1

_TAKE: Final = f"""
local prefix, wanted = KEYS[1], tonumber(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local grant, wait, tightest, left = wanted, 0, 1, {{}}
for index = 1, (#ARGV - 1) / 2 do
  local key, rate = prefix .. ARGV[2 * index], tonumber(ARGV[2 * index + 1])
  local found = redis.call('HMGET', key, 'tokens', 'at')
  local tokens = rate
  if found[1] and found[2] then
    local passed = math.max(0, now - tonumber(found[2]))
    tokens = math.min(rate, tonumber(found[1]) + passed * rate / {WINDOW_SECONDS}000000)
  end
  left[index] = {{key, tokens}}
  if tokens < 1 then
    local seconds = (1 - tokens) * {WINDOW_SECONDS} / rate
    if seconds > wait then wait, tightest = seconds, index end
  end
  grant = math.min(grant, math.floor(tokens))
end
if grant < 1 then return {{0, math.ceil(wait * 1000), tightest}} end
for _, each in ipairs(left) do
  local tokens = string.format('%.6f', each[2] - grant)
  redis.call('HSET', each[1], 'tokens', tokens, 'at', string.format('%.0f', now))
  redis.call('EXPIRE', each[1], {2 * WINDOW_SECONDS})
end
return {{grant, 0, 0}}
"""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A limit, and whose it is."""

    name: str
    per_minute: int

    @property
    def block(self) -> int:
        """So many tokens are taken at a time: what a second brings, and at least one."""
        return max(1, self.per_minute // WINDOW_SECONDS)


@dataclass(frozen=True, slots=True)
class Grant:
    """What the buckets gave."""

    tokens: int
    """None: 0."""
    wait_seconds: float = 0.0
    """With no tokens: until there is one."""
    bucket: Bucket | None = None
    """With no tokens: the bucket that is empty the longest."""


class Buckets:
    """The buckets of a deployment. For event loops: each has a connection of its own."""

    def __init__(self, settings: Settings, *, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        """Prepare; nothing is connected yet.

        Args:
            settings: Where the broker is.
            patience_seconds: A broker that is silent for so long counts as away.
        """
        self._url = settings.broker_url
        self._prefix = f"{settings.queue_prefix}rate:"
        self._patience = patience_seconds
        self._scripts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = (
            weakref.WeakKeyDictionary()
        )
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, redis.asyncio.Redis] = (
            weakref.WeakKeyDictionary()
        )

    async def take(self, buckets: Sequence[Bucket]) -> Grant:
        """Take a block of tokens from all buckets; as many as the emptiest has, if it has fewer.

        Raises:
            QueueUnavailable: If the broker does not answer at once.
        """
        script = await self._script_of_loop()
        from redis.exceptions import RedisError  # noqa: PLC0415 - as below

        arguments: list[str | int] = [min(bucket.block for bucket in buckets)]
        for bucket in buckets:
            arguments += [bucket.name, bucket.per_minute]
        try:
            answer = await script(keys=[self._prefix], args=arguments)
        except (RedisError, OSError) as error:
            raise QueueUnavailable("The broker does not answer.") from error
        tokens, wait_milliseconds, tightest = cast("list[int]", answer)
        if tokens > 0:
            return Grant(tokens)
        return Grant(0, wait_milliseconds / 1000, buckets[tightest - 1])

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        loop = asyncio.get_running_loop()
        self._scripts.pop(loop, None)
        client = self._clients.pop(loop, None)
        if client is not None:
            await client.aclose()

    async def _script_of_loop(self) -> Any:
        loop = asyncio.get_running_loop()
        script = self._scripts.get(loop)
        if script is None:
            # Imported when it is first used, so that the API starts without it; in a thread,
            # because it takes a tenth of a second.
            client = await to_thread.run_sync(self._client)
            script = self._scripts[loop] = client.register_script(_TAKE)
            self._clients[loop] = client
        return script

    def _client(self) -> redis.asyncio.Redis:
        import redis.asyncio  # noqa: PLC0415 - see `_script_of_loop`
        from redis.asyncio.retry import Retry  # noqa: PLC0415 - as above
        from redis.backoff import NoBackoff  # noqa: PLC0415 - as above

        return redis.asyncio.Redis.from_url(
            self._url,
            socket_connect_timeout=self._patience,
            socket_timeout=self._patience,
            # A connection that the broker has closed is opened again; silence is not asked twice.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,)),
            max_connections=8,
        )
