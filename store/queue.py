"""The doorbell: Celery messages that say a queue has work. Losing one delays a job, no more."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from grit_core.config.devices import PRIORITY

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from celery import Celery
    from kombu.connection import ConnectionPool

    from store.settings import Settings

CLAIM_TASK: Final = "grit.claim"
INFER_TASK: Final = "grit.infer"
REGISTER_MODELS_TASK: Final = "grit.register_models"
TRAINING_QUEUES: Final = ("cuda", "mps", "cpu")
INFERENCE_QUEUES: Final = ("infer.cuda", "infer.mps", "infer.cpu")
_AUTO: Final = "auto:"
_ORDERS: Final = tuple(dict.fromkeys(PRIORITY.values()))
_WITHOUT_CPU: Final = tuple(tuple(each for each in order if each != "cpu") for order in _ORDERS)
_SOCKET_SECONDS: Final = 0.4
_CONNECTIONS: Final = 10


def auto_queue(devices: Sequence[str]) -> str:
    """Return the queue of the jobs that may run on any of some devices, the best first.

    `auto:cuda,mps,cpu` for several; with one device there is nothing to choose, and its own queue
    is returned.
    """
    return devices[0] if len(devices) == 1 else f"{_AUTO}{','.join(devices)}"


AUTO_QUEUES: Final = tuple(
    dict.fromkeys(auto_queue(order) for order in (*_ORDERS, *_WITHOUT_CPU) if len(order) > 1)
)
"""Where jobs wait that named a strategy; no worker consumes one of them only.

Those without the CPU are for jobs whose `precision` a CPU does not train in.
"""


def candidate_devices(queue: str) -> tuple[str, ...]:
    """Return the devices whose training workers may claim from a queue, the best first."""
    if queue.startswith(_AUTO):
        return tuple(queue.removeprefix(_AUTO).split(","))
    return (queue,)


def serving_device(queue: str, live: Collection[str]) -> str | None:
    """Return the device whose worker claims the jobs of a training queue now.

    Args:
        queue: A device's queue, or one of `AUTO_QUEUES`.
        live: The queues that live workers serve.

    Returns:
        The first candidate with a live worker, be it busy or idle; none if there is no such worker.
    """
    return next((device for device in candidate_devices(queue) if device in live), None)


def queues_served(device: str, live: Collection[str]) -> list[str]:
    """Return the queues whose jobs a training worker of a device claims now, its own first.

    It leaves the jobs of a strategy to better devices for as long as one of those is live.
    """
    known = {device, *live}
    return [device, *(queue for queue in AUTO_QUEUES if serving_device(queue, known) == device)]


def inference_queue(device: str) -> str:
    """Return the inference queue of a device: `infer.cpu` for `cpu`."""
    return f"infer.{device}"


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return the Celery settings that producers and workers share."""
    return {
        "broker_url": settings.broker_url,
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            "visibility_timeout": 120,
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "global_keyprefix": settings.queue_prefix,
        },
        "result_backend": None,
        "task_ignore_result": True,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_acks_late": False,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "task_send_sent_event": False,
        "enable_utc": True,
    }


def create_celery(settings: Settings) -> Celery:
    """Return a Celery app with the shared settings; the worker adds its tasks to one."""
    # A tenth of a second that an API pays when it first rings and not when it starts.
    from celery import Celery  # noqa: PLC0415

    # Not the process's current app: a test or a script may hold several.
    app = Celery("grit", set_as_current=False)
    app.conf.update(celery_config(settings))
    return app


class Doorbell:
    """Rings queues. Best effort, at most about a second, and it never raises."""

    def __init__(self, settings: Settings) -> None:
        """Prepare to ring; nothing is connected yet."""
        self._settings = settings
        self._app: Celery | None = None
        # Of its own: Celery's pools belong to the process, and closing one closes it for all.
        self._connections: ConnectionPool | None = None
        self._lock = threading.Lock()

    def ring(self, queue: str) -> bool:
        """Say that a training queue has work; true if the broker took the message."""
        return self._send(CLAIM_TASK, [queue], queue)

    def num_unheard(self, queue: str) -> int | None:
        """Count the messages of a queue that no worker has taken; none if the broker is away."""
        from kombu.exceptions import KombuError  # noqa: PLC0415 - as in create_celery
        from redis.exceptions import RedisError  # noqa: PLC0415

        try:
            _, connections = self._producer()
            with connections.acquire(block=True, timeout=_SOCKET_SECONDS) as connection:
                # Not passive: whether a list is there is asked without the prefix of its name.
                return int(connection.default_channel.queue_declare(queue).message_count)
        except (OSError, KombuError, RedisError):
            return None

    def ring_models(self, queues: Iterable[str]) -> bool:
        """Say to the workers of some queues that base models wait to be looked up and probed.

        Name queues that live workers serve: no worker reads the messages of the others. A broker
        that does not take the first message is not asked again.
        """
        return all(self._send(REGISTER_MODELS_TASK, [], name) for name in queues)

    def ring_infer(self, request_id: str, *, device: str) -> bool:
        """Say that a request waits in the mailbox."""
        return self._send(INFER_TASK, [request_id], inference_queue(device))

    def close(self) -> None:
        """Close the connections; a later ring opens new ones."""
        with self._lock:
            app, connections = self._app, self._connections
            self._app = self._connections = None
        if connections is not None:
            connections.force_close_all()
        if app is not None:
            app.close()

    def _producer(self) -> tuple[Celery, ConnectionPool]:
        with self._lock:
            if self._app is None or self._connections is None:
                self._app = create_celery(self._settings)
                # A producer gives up at once: the row is written, and the dispatcher rings again.
                self._app.conf.broker_transport_options = {
                    **self._app.conf.broker_transport_options,
                    "socket_timeout": _SOCKET_SECONDS,
                    "socket_connect_timeout": _SOCKET_SECONDS,
                    "retry_on_timeout": False,
                    "max_retries": 0,
                    "connect_retries_timeout": _SOCKET_SECONDS,
                }
                connection = self._app.connection_for_write()
                self._connections = connection.Pool(limit=_CONNECTIONS)
            return self._app, self._connections

    def _send(self, task: str, arguments: list[str], queue: str) -> bool:
        from kombu.exceptions import KombuError  # noqa: PLC0415 - as in create_celery
        from redis.exceptions import RedisError  # noqa: PLC0415

        try:
            app, connections = self._producer()
            with connections.acquire(block=True, timeout=_SOCKET_SECONDS) as connection:
                app.send_task(
                    task,
                    args=arguments,
                    queue=queue,
                    connection=connection,
                    retry=False,
                    ignore_result=True,
                )
        except (OSError, KombuError, RedisError):
            return False
        return True
