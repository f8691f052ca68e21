"""Answers that wait: long-polls and event streams, bounded in number, off the request threads."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from anyio import CancelScope, CapacityLimiter, sleep
from anyio.lowlevel import RunVar
from fastapi import Response

from api.errors import Problem

POLL_SECONDS: Final = 0.25
MAX_WAITING: Final = 1000
_THREADS: Final = 8

Item = TypeVar("Item")

_limiter: RunVar[CapacityLimiter] = RunVar("grit_poll_limiter")


class Places:
    """How many answers may wait at once."""

    def __init__(self, bound: int = MAX_WAITING) -> None:
        self._bound = bound
        self._taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Take a place while an answer waits.

        Raises:
            Problem: If none is free.
        """
        if self._taken >= self._bound:
            raise Problem("too_many_waiting", f"At most {self._bound} requests may wait at once.")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


PLACES: Final = Places()
"""Of this process; asyncio gives each step of the count to one task at a time."""


def poll_limiter() -> CapacityLimiter:
    """Return the few threads that look at the database for those who wait."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = CapacityLimiter(_THREADS)
        _limiter.set(limiter)
        return limiter


async def kept_alive(
    items: AsyncGenerator[Item], *, silence_seconds: float
) -> AsyncGenerator[Item | None]:
    """Yield every item as it comes, and none whenever there was silence for so long.

    Closing this generator closes the other, whatever it waits for.
    """
    coming: asyncio.Task[Item] | None = None
    try:
        while True:
            coming = coming or asyncio.create_task(_next(items))
            done, _ = await asyncio.wait({coming}, timeout=silence_seconds)
            if not done:
                yield None
                continue
            came, coming = coming, None
            try:
                item = came.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        # The reader's scope may be cancelled, which would end these waits at once.
        with CancelScope(shield=True):
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})
            await items.aclose()


async def _next(items: AsyncGenerator[Item]) -> Item:
    return await anext(items)


async def wait_for_change(
    read: Callable[[], Awaitable[tuple[bytes, str, bool]]],
    *,
    wait_seconds: float,
    known: str | None,
) -> Response:
    """Answer with what `read` returns, now or as soon as it changes.

    Args:
        read: Returns the JSON, its ETag, and whether it will not change any more.
        wait_seconds: How long to wait; 0 answers at once.
        known: The caller's `If-None-Match`.
    """
    data, etag, final = await read()
    if wait_seconds > 0 and not final and known in {None, etag}:
        with PLACES.one():
            data, etag = await _changed(read, etag, data, time.monotonic() + wait_seconds)
    if known is not None and matches(known, etag):
        return Response(status_code=304, headers={"ETag": etag})
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    return Response(data, media_type="application/json", headers=headers)


async def _changed(
    read: Callable[[], Awaitable[tuple[bytes, str, bool]]], etag: str, data: bytes, deadline: float
) -> tuple[bytes, str]:
    first = etag
    while etag == first and time.monotonic() < deadline:
        await sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        data, etag, _ = await read()
    return data, etag


def matches(if_none_match: str, etag: str) -> bool:
    """Tell whether an `If-None-Match` header names an ETag."""
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return "*" in tags or etag in tags
