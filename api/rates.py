"""How often a caller may ask: limits of a key and of its team, shared with the other processes.

A request takes a token that this process took from the broker before, a second's worth at a time:
most requests cost a look into a table. While the broker is away or silent, each process counts by
itself, which allows as many times the limit as there are processes, and never holds a request up.
"""

import asyncio
import math
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import structlog

from api.errors import Problem
from store.errors import QueueUnavailable
from store.keys import Caller
from store.rates import WINDOW_SECONDS, Bucket, Buckets, Grant
from store.settings import Settings

log = structlog.get_logger(__name__)

_MAX_POOLS: Final = 8192
_LEASE_SECONDS: Final = 10.0
_ALONE_SECONDS: Final = 5.0


class Kind(StrEnum):
    """What is counted."""

    REQUESTS = "requests"
    SUBMISSIONS = "submissions"


@dataclass(slots=True)
class _Pool:
    """What this process has of a caller's tokens."""

    tokens: int = 0
    valid_until: float = 0.0
    refusal: Grant | None = None
    refused_until: float = 0.0


@dataclass(slots=True)
class _OwnBucket:
    """A bucket of this process alone."""

    tokens: float
    at: float = field(default_factory=time.monotonic)


class RateLimited(Problem):
    """A caller asks too often."""

    def __init__(self, grant: Grant, caller: Caller, kind: Kind, *, wait_seconds: float) -> None:
        seconds = max(1, math.ceil(wait_seconds))
        limit = 0 if grant.bucket is None else grant.bucket.per_minute
        of_team = grant.bucket is not None and grant.bucket.name.startswith(f"{kind}:team:")
        whose = f"team {caller.team!r}, all keys together" if of_team else f"key {caller.key_id}"
        super().__init__(
            "rate_limited",
            f"Of {whose}, at most {limit} {kind} a minute are taken; try again in {seconds} s. An"
            " administrator may give the team another rate.",
            headers={
                "Retry-After": str(seconds),
                "RateLimit-Limit": str(limit),
                "RateLimit-Remaining": "0",
                "RateLimit-Reset": str(seconds),
                "RateLimit-Policy": f"{limit};w={WINDOW_SECONDS}",
            },
        )


class Limiter:
    """Lets requests through or refuses them. For one process; used from its event loop."""

    def __init__(self, settings: Settings, buckets: Buckets | None = None) -> None:
        """Prepare; the broker is connected at the first request that needs it."""
        self._settings = settings
        self._buckets = buckets or Buckets(settings)
        self._pools: OrderedDict[tuple[str, Kind], _Pool] = OrderedDict()
        self._own: OrderedDict[str, _OwnBucket] = OrderedDict()
        self._alone_until = 0.0
        self._is_alone = False
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = (
            weakref.WeakKeyDictionary()
        )

    async def admit(self, caller: Caller, *, submits: bool) -> None:
        """Count a request against the limits of its key and its team, or raise `RateLimited`."""
        if not self._take(caller, Kind.REQUESTS):
            await self._lease(caller, Kind.REQUESTS)
        if submits and not self._take(caller, Kind.SUBMISSIONS):
            await self._lease(caller, Kind.SUBMISSIONS)

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        await self._buckets.close()

    def _take(self, caller: Caller, kind: Kind) -> bool:
        """Take a token that is here; false if there is none."""
        pool = self._pools.get((caller.key_id, kind))
        if pool is None or pool.tokens < 1 or time.monotonic() > pool.valid_until:
            return False
        pool.tokens -= 1
        return True

    async def _lease(self, caller: Caller, kind: Kind) -> None:
        """Take tokens from the broker, and one of them for this request.

        Raises:
            RateLimited: If there is none.
        """
        buckets = self._buckets_of(caller, kind)
        if not buckets:
            return
        turn = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        if self._is_alone and turn.locked():
            # Somebody asks whether the broker is back; nobody else waits for that.
            self._settle(self._take_own(buckets), caller, kind)
            return
        async with turn:
            # Whoever was first may have taken enough for all who waited.
            if self._take(caller, kind):
                return
            pool = self._pool(caller.key_id, kind)
            now = time.monotonic()
            # Under another rate than the one that refused, the broker is asked again.
            refusal = pool.refusal
            if refusal and refusal.bucket in buckets and now < pool.refused_until:
                raise RateLimited(refusal, caller, kind, wait_seconds=pool.refused_until - now)
            self._settle(await self._ask(buckets), caller, kind)

    def _settle(self, grant: Grant, caller: Caller, kind: Kind) -> None:
        """Keep what was given, less the token of this request.

        Raises:
            RateLimited: If it was nothing.
        """
        pool, now = self._pool(caller.key_id, kind), time.monotonic()
        if grant.tokens < 1:
            pool.refusal, pool.refused_until = grant, now + grant.wait_seconds
            raise RateLimited(grant, caller, kind, wait_seconds=grant.wait_seconds)
        pool.tokens, pool.valid_until = grant.tokens - 1, now + _LEASE_SECONDS

    async def _ask(self, buckets: list[Bucket]) -> Grant:
        if time.monotonic() < self._alone_until:
            return self._take_own(buckets)
        try:
            grant = await self._buckets.take(buckets)
        except QueueUnavailable as error:
            self._alone_until = time.monotonic() + _ALONE_SECONDS
            if not self._is_alone:
                log.warning("rates_counted_alone", reason=str(error))
            self._is_alone = True
            return self._take_own(buckets)
        if self._is_alone:
            log.info("rates_counted_together")
            self._is_alone = False
        return grant

    def _take_own(self, buckets: list[Bucket]) -> Grant:
        """Take one token of each bucket as this process alone counts them."""
        now = time.monotonic()
        found: list[tuple[Bucket, _OwnBucket]] = []
        for bucket in buckets:
            own = self._own.pop(bucket.name, None) or _OwnBucket(float(bucket.per_minute))
            gained = (now - own.at) * bucket.per_minute / WINDOW_SECONDS
            own.tokens, own.at = min(float(bucket.per_minute), own.tokens + gained), now
            self._own[bucket.name] = own
            found.append((bucket, own))
        while len(self._own) > _MAX_POOLS:
            self._own.popitem(last=False)
        waits = [
            ((1 - own.tokens) * WINDOW_SECONDS / bucket.per_minute, bucket)
            for bucket, own in found
            if own.tokens < 1
        ]
        if waits:
            seconds, bucket = max(waits, key=lambda wait: wait[0])
            return Grant(0, seconds, bucket)
        for _, own in found:
            own.tokens -= 1
        return Grant(1)

    def _buckets_of(self, caller: Caller, kind: Kind) -> list[Bucket]:
        settings = self._settings
        if kind is Kind.REQUESTS:
            own = caller.requests_per_minute
            of_key, of_team = (
                settings.rate_requests_per_minute,
                settings.rate_team_requests_per_minute,
            )
        else:
            own = caller.submissions_per_minute
            of_key = settings.rate_submissions_per_minute
            of_team = settings.rate_team_submissions_per_minute
        if own is not None:
            # A key may use all that its team was given.
            of_key, of_team = 0, own
        rates = {f"{kind}:key:{caller.key_id}": of_key, f"{kind}:team:{caller.team}": of_team}
        return [Bucket(name, rate) for name, rate in rates.items() if rate > 0]

    def _pool(self, key_id: str, kind: Kind) -> _Pool:
        pool = self._pools.setdefault((key_id, kind), _Pool())
        self._pools.move_to_end((key_id, kind))
        while len(self._pools) > _MAX_POOLS:
            self._pools.popitem(last=False)
        return pool
