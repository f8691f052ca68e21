"""The number format of a job, decided on the machine whose device computes it."""

from dataclasses import replace

from grit_core.checkpoints import Checkpoint
from grit_core.config.bounds import Choice
from grit_core.config.devices import has_native_bfloat16, training_precision
from grit_core.errors import InvalidConfig
from grit_core.events import Warned
from grit_core.job_spec import AUTO
from grit_core.models.pretrained import DTYPES, read_model_types
from grit_core.processes import Processes
from grit_core.training_job import TrainingJob


def resolve_precision(precision: str, *, model: str, device: str) -> str:
    """Return the number format that a job computes in.

    Args:
        precision: As the job has it; `auto` is what this machine's device trains in by itself.
        model: The base model's folder or hub id. Some models' activations leave float16's range.
        device: One that is there. In several processes each asks its own, and all of them take
            what every device has.

    Raises:
        InvalidConfig: There is no such precision.
    """
    fault = Choice(values=(AUTO, *DTYPES)).fault(precision, pointer="/precision")
    if fault is not None:
        raise InvalidConfig([fault])
    if precision != AUTO:
        return precision
    emulated = not has_native_bfloat16(device)
    return training_precision(
        device,
        native_bfloat16=not Processes.current().any_of(emulated),
        model_types=read_model_types(model),
    )


def resolve_job_precision(job: TrainingJob, checkpoint: Checkpoint | None) -> TrainingJob:
    """Return a job with its number format decided.

    Args:
        job: Perhaps with the precision `auto`.
        checkpoint: To resume from: the job goes on in the number format that it began with, on
            whatever card.
    """
    precision = resolve_precision(job.precision, model=job.model, device=job.device)
    if job.precision != AUTO:
        return job
    if checkpoint is not None:
        precision = checkpoint.values["identity"]["precision"]
    training = replace(job.training, precision=precision)
    return replace(job, precision=precision, training=training)


def emulation_warning(precision: str, device: str) -> Warned | None:
    """Return a warning of a number format that the device only emulates; none where it has it."""
    if precision != "bfloat16" or has_native_bfloat16(device):
        return None
    return Warned(
        code="bfloat16_emulated",
        message=f"{device} has no bfloat16 units and emulates the job's bfloat16: the numbers are"
        " right, the steps are slow. float16 is what it computes fast, where the model's"
        " activations fit into it.",
    )
