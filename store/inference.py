"""The mailbox between `POST /infer` and the worker: requests and answers in Redis, for a while."""

from typing import Any

from store.settings import Settings


class Mailbox:
    """Passes inference requests to a worker and its answers back. Safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        """Prepare the connections; nothing is connected yet."""
        raise NotImplementedError

    def submit(self, request_id: str, *, device: str, payload: dict[str, Any]) -> None:
        """Store a request and ring the device's inference queue.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        raise NotImplementedError

    def take(self, request_id: str) -> dict[str, Any] | None:
        """Take a request out of the mailbox, for one worker only; none if it is gone or expired.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        raise NotImplementedError

    def answer(self, request_id: str, message: dict[str, Any]) -> None:
        """Append a message to a request's answer: the whole one, or a part of a stream.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        raise NotImplementedError

    def wait(self, request_id: str, *, timeout_seconds: float) -> dict[str, Any] | None:
        """Return the next message of an answer; none after the timeout.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        raise NotImplementedError

    async def wait_async(self, request_id: str, *, timeout_seconds: float) -> dict[str, Any] | None:
        """As `wait`, without holding a thread.

        Raises:
            QueueUnavailable: If the broker does not answer.
        """
        raise NotImplementedError

    def cancel(self, request_id: str) -> None:
        """Drop a request that nobody waits for any more; `is_cancelled` becomes true."""
        raise NotImplementedError

    def is_cancelled(self, request_id: str) -> bool:
        """Tell whether the caller went away."""
        raise NotImplementedError

    def ping(self) -> None:
        """Ask the broker for an answer, for readiness.

        Raises:
            QueueUnavailable: If it gives none within a second.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Close the connections of the running event loop and the others."""
        raise NotImplementedError
