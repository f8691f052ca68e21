"""Room on the worker's disk: looked at before an attempt, rather than found missing at its end."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from grit_core.config.training import TrainingConfig
from grit_core.estimate import checkpoint_bytes
from grit_core.plan import AdaptationPlan
from store.models import JobKind
from worker import failures

if TYPE_CHECKING:
    from pathlib import Path

    from grit_core.events import TrainingFailed
    from store.models import Job

_CHECKPOINTS = 3
"""Two are kept while the next is written; what is uploaded are links to them."""
_ADAPTERS = 2
"""The one that is written, and the copy that is read back from the object store."""


def shortage(job: Job, folder: Path) -> TrainingFailed | None:
    """Return why a job's checkpoints and adapter do not fit beside `folder`, if they do not."""
    needed_bytes = needed(job)
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= needed_bytes:
        return None
    return failures.no_room(folder, needed_bytes=needed_bytes, free_bytes=free_bytes)


def needed(job: Job) -> int:
    """Return about how many bytes an attempt writes; 0 for a compression, which writes little."""
    if job.kind == JobKind.COMPRESSION:
        return 0
    plan = AdaptationPlan.from_json(job.plan)
    one = checkpoint_bytes(plan, TrainingConfig(**job.training))
    return _CHECKPOINTS * one + _ADAPTERS * 4 * plan.trainable_parameters
