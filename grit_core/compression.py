"""`compress`: cut a finished adapter's weakest directions, as a generator of events."""

from collections.abc import Callable, Iterator

from grit_core.compression_job import CompressionJob
from grit_core.events import TrainingEvent


def compress(
    job: CompressionJob, *, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[TrainingEvent]:
    """Compress an adapter and yield what happens as it happens.

    Writes `work_dir/adapter/`. The events are `TrainingStarted` (of 0 steps), perhaps `Warned`,
    `Compacted`, `AdapterSaved` and `TrainingFinished`; asked to stop, it ends with
    `TrainingStopped` and leaves nothing.

    Errors: `InvalidConfig` (a number out of bounds), `ModelUnavailable`, `PlanMismatch`,
    `DeviceUnavailable`, `InvalidDataset`, `AdapterInvalid` (not a LoRA adapter of this model, or
    one whose exported form does not give the same logits).

    Args:
        job: What to compress, and how far.
        should_stop: Asked between rows.
    """
    raise NotImplementedError
