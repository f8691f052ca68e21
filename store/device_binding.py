"""The device of a job that named a strategy: bound when a worker claims the job.

Which worker that will be is not known at submission. So the API settles what each device would
train with, and the claim takes one of these options. A job that waits again is free again, unless
it has a checkpoint: it then goes on with the numbers that it began with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from store.models import Checkpoint, Job
from store.queue import auto_queue


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """A device that a job may be bound to."""

    device: str
    reason: str
    """Why this one, for when it is the one."""
    training: Mapping[str, Any]
    """All of the job's training settings, as they are on this device."""


def device_columns(wanted: str, reason: str, options: Sequence[DeviceOption]) -> dict[str, Any]:
    """Return the columns of a job that waits for any of several devices.

    Args:
        wanted: The strategy that was asked for; what the job shows as its device for now.
        reason: What decides, in words.
        options: The best first, two at least; their training settings name the same fields.
    """
    first = options[0].training
    open_fields = {name for each in options for name in first if each.training[name] != first[name]}
    columns = {
        "device": wanted,
        "device_reason": reason,
        "queue": auto_queue([each.device for each in options]),
    }
    choices = {
        each.device: {
            "reason": each.reason,
            "training": {name: each.training[name] for name in sorted(open_fields)},
        }
        for each in options
    }
    return {**columns, "device_options": {"unbound": columns, "choices": choices}}


def bound_columns(job: Job, device: str) -> dict[str, Any]:
    """Return the columns that bind a job to the device that claims it; none if it is bound."""
    if job.device_options is None or job.queue == device:
        return {}
    choice = job.device_options["choices"][device]
    return {
        "device": device,
        "device_reason": choice["reason"],
        "queue": device,
        "training": {**job.training, **choice["training"]},
    }


def unbound_columns(session: Session, job: Job) -> dict[str, Any]:
    """Return the columns that let any of its devices claim a job again, if it may change."""
    if job.device_options is None:
        return {}
    has_checkpoint = exists(select(Checkpoint.step).where(Checkpoint.job_id == job.id))
    if session.scalars(select(has_checkpoint)).one():
        return {}
    return dict(job.device_options["unbound"])
