"""Whoever can write to the broker can make a worker do its own tasks, and nothing else.

Celery takes a worker down at some malformed messages, and puts them back for the next one. Here
every message is compared with what `store.queue` sends before anything acts on it; all others are
logged and dropped.
"""

from __future__ import annotations

import json
from queue import Empty
from typing import TYPE_CHECKING, Any, Final

import structlog
from celery.worker.consumer import Consumer
from kombu.transport import redis
from redis.exceptions import DataError, RedisError

from store.queue import CLAIM_TASK, INFER_TASK, REGISTER_MODELS_TASK

if TYPE_CHECKING:
    from collections.abc import Callable

TASKS: Final = {CLAIM_TASK: 1, INFER_TASK: 1, REGISTER_MODELS_TASK: 0}
"""Our tasks, and how many texts each takes."""
MAX_BODY_BYTES: Final = 4096
MAX_ARGUMENT_CHARACTERS: Final = 100
_UNSET: Final = ("eta", "expires", "group", "compression", "stamped_headers", "replaced_task")
_log = structlog.get_logger(__name__)


class GuardedChannel(redis.Channel):  # type: ignore[misc] # kombu ships no types
    """Drops what is no message at all."""

    def _brpop_read(self, **options: Any) -> Any:
        """Read one message and hand it on.

        Raises:
            Empty: There was none, or it could not be read.
            RedisError: The broker is away.
            OSError: Likewise.
        """
        try:
            return super()._brpop_read(**options)
        except (Empty, RedisError, OSError) as error:
            if not isinstance(error, DataError):  # which is raised before anything is sent
                raise
            cause: Exception = error
        except Exception as error:  # noqa: BLE001 - each is the message's fault
            cause = error
        _log.warning("message_unreadable", error=f"{type(cause).__name__}: {cause}"[:200])
        raise Empty from cause


class GuardedTransport(redis.Transport):  # type: ignore[misc] # kombu ships no types
    """Redis, or Valkey, with guarded channels."""

    Channel = GuardedChannel


class GuardedConsumer(Consumer):  # type: ignore[misc] # celery ships no types
    """Drops messages that ask for something else than our tasks."""

    def create_task_handler(self, *arguments: Any, **options: Any) -> Callable[[Any], None]:
        """Return what Celery calls with each message."""
        handle = super().create_task_handler(*arguments, **options)

        def received(message: Any) -> None:
            fault = fault_of(message)
            if fault is None:
                handle(message)
                return
            _log.warning("message_refused", fault=fault)
            message.ack_log_error(_AckLogger(), self.connection_errors)

        return received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Drop a message whose body cannot be decoded; Celery would first try to show it."""
        _log.warning("message_unreadable", error=f"{type(exc).__name__}: {exc}"[:200])
        message.ack_log_error(_AckLogger(), self.connection_errors)


def fault_of(message: Any) -> str | None:
    """Return what a message has that ours have not; none for one of ours."""
    headers = message.headers
    if not isinstance(headers, dict):
        return "no headers"
    task = headers.get("task")
    if not isinstance(task, str) or task not in TASKS:
        return "not one of our tasks"
    if message.content_type != "application/json" or message.content_encoding != "utf-8":
        return "not JSON in UTF-8"
    if not isinstance(headers.get("id"), str) or headers.get("retries") not in (0, None):
        return "odd headers"
    limits = headers.get("timelimit")
    if any(headers.get(name) for name in _UNSET) or limits not in (None, [None, None]):
        return "headers that ours never have"
    return _fault_of_body(message.body, num_arguments=TASKS[task])


def _fault_of_body(body: Any, *, num_arguments: int) -> str | None:
    if not isinstance(body, bytes | str) or len(body) > MAX_BODY_BYTES:
        return "no short body"
    try:
        arguments, named, embedded = json.loads(body)
        odd = bool(named) or any(dict(embedded).values())
    except (ValueError, TypeError, RecursionError):
        return "a body of another form"
    texts = isinstance(arguments, list) and all(
        isinstance(each, str) and len(each) <= MAX_ARGUMENT_CHARACTERS for each in arguments
    )
    if odd or not texts or len(arguments) != num_arguments:
        return "arguments that ours never have"
    return None


class _AckLogger:
    """What kombu tells of an acknowledgement that failed."""

    @staticmethod
    def critical(text: str, *arguments: object, **_: object) -> None:
        _log.warning("message_not_acknowledged", error=text % arguments if arguments else text)
