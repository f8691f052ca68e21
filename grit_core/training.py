"""`train`: one fine-tuning run as a generator of events."""

from collections.abc import Callable, Iterator
from pathlib import Path

from grit_core.events import TrainingEvent
from grit_core.training_job import TrainingJob


def train(
    job: TrainingJob,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    resume_from: Path | None = None,
) -> Iterator[TrainingEvent]:
    """Fine-tune the job's base model and yield what happens as it happens.

    Writes `work_dir/checkpoints/step-N/` while it runs and `work_dir/adapter/` at its end. The last
    events of a whole run are `AdapterSaved` and `TrainingFinished`; a run that `should_stop` ends saves
    a checkpoint at the next step boundary and ends with `TrainingStopped`.

    Args:
        job: What to train.
        should_stop: Asked between optimizer steps.
        resume_from: A checkpoint folder (`.../step-N`). The resumed run ends with the same bytes as
            one that was never interrupted, on the CPU.

    Raises:
        PlanMismatch: The model is not the one that the plan was made for.
        ModelUnavailable: The base model cannot be read.
        InvalidDataset: A row cannot be used; the message names file and line.
        TrainingDiverged: A loss or gradient is not finite; nothing of that step was applied.
        CheckpointCorrupt: `resume_from` fails its checks.
        AdapterInvalid: The written adapter does not give the trained model's logits.
    """
    raise NotImplementedError
    yield
