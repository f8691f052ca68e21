"""The doorbell: Celery messages that say a queue has work. Losing one delays a job, nothing more."""

from typing import Any, Final

from celery import Celery

from store.settings import Settings

CLAIM_TASK: Final = "grit.claim"
INFER_TASK: Final = "grit.infer"
REGISTER_MODELS_TASK: Final = "grit.register_models"
TRAINING_QUEUES: Final = ("cuda", "mps", "cpu")
INFERENCE_QUEUES: Final = ("infer.cuda", "infer.mps", "infer.cpu")


def inference_queue(device: str) -> str:
    """Return the inference queue of a device: `infer.cpu` for `cpu`."""
    return f"infer.{device}"


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return the Celery settings that producers and workers share."""
    raise NotImplementedError


def create_celery(settings: Settings) -> Celery:
    """Return a Celery app with the shared settings; the worker adds its tasks to one."""
    raise NotImplementedError


class Doorbell:
    """Rings queues. Best effort, at most about a second, and it never raises."""

    def __init__(self, settings: Settings) -> None:
        """Prepare to ring; nothing is connected yet."""
        raise NotImplementedError

    def ring(self, queue: str) -> bool:
        """Say that a training queue has work; true if the broker took the message."""
        raise NotImplementedError

    def ring_models(self, queue: str | None = None) -> bool:
        """Say that base models wait for their inventory, on one or on all inference queues."""
        raise NotImplementedError

    def ring_infer(self, request_id: str, *, device: str) -> bool:
        """Say that a request waits in the mailbox."""
        raise NotImplementedError
