"""A body that comes too slowly is not waited for: each one would hold a connection for ever."""

import time
from typing import Final

from anyio import fail_after
from starlette.types import Message, Receive

from api.errors import Problem

MIN_BYTES_PER_SECOND: Final = 1024


class PacedBody:
    """Receives a request's body, and refuses it when too little of it comes in some seconds."""

    def __init__(self, receive: Receive, *, seconds: float) -> None:
        """Begin.

        Args:
            receive: Where the body comes from.
            seconds: As long as this it may come more slowly.
        """
        self._receive, self._seconds = receive, seconds
        self._least_bytes = MIN_BYTES_PER_SECOND * seconds
        self._until = time.monotonic() + seconds
        self._num_bytes = 0
        self._is_whole = False

    async def __call__(self) -> Message:
        """Return the next message; what comes after the body has all the time in the world.

        A body that is too slow is a `Problem`.
        """
        if self._is_whole:
            return await self._receive()
        try:
            with fail_after(max(0.0, self._until - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise self._too_slow() from None
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._is_whole = True
            return message
        self._num_bytes += len(message.get("body", b""))
        if time.monotonic() >= self._until or self._num_bytes >= self._least_bytes:
            if self._num_bytes < self._least_bytes:
                raise self._too_slow()
            self._num_bytes, self._until = 0, time.monotonic() + self._seconds
        return message

    def _too_slow(self) -> Problem:
        detail = (
            f"Less than {MIN_BYTES_PER_SECOND} bytes a second came in {self._seconds:g} seconds;"
            " send the body at once."
        )
        return Problem("request_timeout", detail, headers={"Connection": "close"})
