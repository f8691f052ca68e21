"""`train`: one fine-tuning run as a generator of events."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from grit_core.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from grit_core.errors import TrainingDiverged
from grit_core.evaluation import evaluate, retention_before
from grit_core.events import (
    CheckpointSaved,
    Evaluated,
    StepCompleted,
    StepSkipped,
    TrainingEvent,
    TrainingStarted,
    TrainingStopped,
    Warned,
)
from grit_core.job_precision import emulation_warning, resolve_job_precision
from grit_core.memory_demand import explained
from grit_core.models.torch_device import torch_device
from grit_core.processes import Processes
from grit_core.random_state import reproducible
from grit_core.row_report import checked
from grit_core.schedule import learning_rate
from grit_core.training_export import export
from grit_core.training_job import TrainingJob
from grit_core.training_rows import open_rows
from grit_core.training_run import TrainingRun


def train(
    job: TrainingJob,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    resume_from: Path | None = None,
) -> Iterator[TrainingEvent]:
    """Fine-tune the job's base model and yield what happens as it happens.

    All rows are checked first. Writes `work_dir/checkpoints/step-N/` while it runs and
    `work_dir/adapter/` at its end. The last events of a whole run are `AdapterSaved` and
    `TrainingFinished`; a run that `should_stop` ends saves a checkpoint at the next step boundary
    (while rows are checked there is nothing to save) and ends with `TrainingStopped`.

    Errors: `PlanMismatch` (another model), `ModelUnavailable`, `DeviceUnavailable`,
    `InvalidDataset` (rows that cannot be used, all at once by file and line, or no row that can),
    `CheckpointCorrupt` (of `resume_from`),
    `TrainingDiverged` (a loss or gradient that is not finite, found before the step is applied),
    `AdapterInvalid` (the written adapter does not give the trained model's logits); in several
    processes also `ProcessLost` and `ReplicasDiverged`.

    In several processes (see `grit_core.processes`) every one of them runs this to its end; the
    first alone yields events and writes files.

    Args:
        job: What to train.
        should_stop: Asked between optimizer steps, and after every row that is checked.
        resume_from: A checkpoint folder (`.../step-N`). On the CPU the resumed run ends with the
            same bytes as one that was never interrupted.
    """
    torch_device(job.device)  # refused at once where it is not there
    checkpoint = None if resume_from is None else load_checkpoint(resume_from)
    job = resolve_job_precision(job, checkpoint)
    num_threads = _threads_of(job, checkpoint)
    leads = Processes.current().leads
    with reproducible(torch.device(job.device), num_threads=num_threads) as num_threads:
        for event in _checked_and_trained(job, checkpoint, should_stop, num_threads=num_threads):
            if leads:
                yield event


def _checked_and_trained(
    job: TrainingJob,
    checkpoint: Checkpoint | None,
    should_stop: Callable[[], bool],
    *,
    num_threads: int,
) -> Iterator[TrainingEvent]:
    """Everything from the first event to the last, in every process alike.

    Rows are checked before the model is loaded: a bad row is known without waiting for gigabytes.
    """
    rows = open_rows(job)
    digest = rows.digest()
    known = None if checkpoint is None else checkpoint.values.get("rows_checked")
    if known != digest:
        complete = yield from checked(rows, model=job.model, should_stop=should_stop)
        if not complete:
            step = 0 if checkpoint is None else checkpoint.step
            yield TrainingStopped(step=step, reason="Stopped as asked, while rows were checked.")
            return
    run = TrainingRun(job, num_threads=num_threads, rows=rows, checked=digest)
    try:
        if checkpoint is not None:
            run.restore(checkpoint)
        yield from _train(run, checkpoint, should_stop)
    finally:
        run.close()


def _train(
    run: TrainingRun, checkpoint: Checkpoint | None, should_stop: Callable[[], bool]
) -> Iterator[TrainingEvent]:
    """Everything that a model is needed for."""
    _refuse_difference(run, what="what they begin with")
    yield _started(run)
    emulated = emulation_warning(run.job.precision, run.job.device)
    if emulated is not None:
        yield emulated
    yield from _changed_machine(run, checkpoint)
    yield from _adam_by_another_name(run.job)
    yield from retention_before(run)
    yield from _optimize(run, should_stop)


def _optimize(run: TrainingRun, should_stop: Callable[[], bool]) -> Iterator[TrainingEvent]:
    """Step until the job is done, told to stop, or no longer improving; then export."""
    clock = time.perf_counter()
    while run.progress.step < run.total_steps:
        if run.processes.any_of(should_stop()):
            yield from _save(run)
            yield TrainingStopped(step=run.progress.step, reason="Stopped as asked.")
            return
        yield from _step(run, clock)
        if _due(run, run.job.training.eval_every_steps) and run.eval_indices:
            yield _evaluate(run)
            if _patience_is_over(run):
                yield _stopped_early(run)
                break
        if _due(run, run.job.training.checkpoint_every_steps):
            yield from _save(run)
    if run.eval_indices and run.progress.evaluated_at_step != run.progress.step:
        yield _evaluate(run)
    _refuse_difference(run, what="the adapter they trained")
    yield from _save(run)
    yield from export(run, should_stop)


def _step(run: TrainingRun, clock: float) -> Iterator[TrainingEvent]:
    """Do one optimizer step."""
    began = time.perf_counter()
    step = run.progress.step
    rows = run.rows_of(step)
    rate = learning_rate(run.job.training, step, total_steps=run.total_steps)
    run.progress.step = step + 1
    if rows.num_label_tokens == 0:
        yield StepSkipped(step=step + 1, reason="Every row of the step was left out.")
        yield from run.skip_step()
        return
    with explained(rows, run.job.plan, step=step + 1):
        yield from run.initialize(rows)
        loss_sum = run.forward_backward(rows)
        # One wait for both numbers.
        total, grad_norm = torch.stack([loss_sum, run.unscaled_grad_norm()]).tolist()
    loss = total / rows.num_label_tokens
    _refuse_non_finite(run, "loss", loss)
    if run.overflowed(grad_norm):
        yield _overflow(run)
        yield from run.skip_step()
        return
    _refuse_non_finite(run, "gradient norm", grad_norm)
    with explained(rows, run.job.plan, step=step + 1):
        run.optimizer_step(rate)
    run.progress.train_loss = loss
    now = time.perf_counter()
    yield StepCompleted(
        step=step + 1,
        total_steps=run.total_steps,
        epoch=(step + 1) / run.sampler.steps_per_epoch,
        train_loss=loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        num_tokens=rows.num_tokens,
        tokens_per_second=rows.num_tokens / (now - began),
        elapsed_seconds=now - clock,
    )
    yield from run.curvature_events()


def _refuse_difference(run: TrainingRun, *, what: str) -> None:
    if run.processes.count > 1:
        run.processes.refuse_difference(run.fingerprint(), what=what)


def _refuse_non_finite(run: TrainingRun, what: str, value: float) -> None:
    """End a run that has diverged before its step is applied.

    Raises:
        TrainingDiverged: The value is not finite.
    """
    if math.isfinite(value):
        return
    run.optimizer.zero_grad(set_to_none=True)
    raise TrainingDiverged(
        f"Training diverged at step {run.progress.step}: the {what} is {value}. Nothing of that"
        " step was applied. Lower training.learning_rate (now"
        f" {run.job.training.learning_rate:g}), or check the rows of that step."
    )


def _overflow(run: TrainingRun) -> StepSkipped:
    run.progress.overflowed_steps += 1
    return StepSkipped(
        step=run.progress.step,
        reason="A float16 gradient overflowed: the step and its observation were dropped"
        f" ({run.progress.overflowed_steps} so far), and the loss scale is now"
        f" {run.loss_scale:g}.",
    )


def _threads_of(job: TrainingJob, checkpoint: Checkpoint | None) -> int | None:
    """The job's number of threads, else the one that the checkpoint was made with."""
    if job.num_threads is not None or checkpoint is None:
        return job.num_threads
    return int(checkpoint.values["num_threads"])


def _changed_machine(run: TrainingRun, checkpoint: Checkpoint | None) -> Iterator[Warned]:
    """Say it when a run goes on with other threads or processes than it had."""
    if checkpoint is None:
        return
    num_processes = checkpoint.values.get("num_processes", 1)
    if num_processes != run.processes.count:
        yield Warned(
            code="processes_changed",
            message=f"Resumed in {run.processes.count} processes after {num_processes}; the result"
            " may differ in the last bits, and dropout drops other entries.",
        )
    if checkpoint.values["num_threads"] != run.num_threads:
        yield Warned(
            code="threads_changed",
            message=f"Resumed with {run.num_threads} CPU threads after"
            f" {checkpoint.values['num_threads']}; the result may differ in the last bits.",
        )


def _adam_by_another_name(job: TrainingJob) -> Iterator[Warned]:
    """Say it when the natural gradient that was asked for amounts to Adam."""
    diagonal = sorted({
        layer.modality.value
        for layer in job.plan.layers
        if layer.natural_gradient and layer.fisher_approximation == "diagonal"
    })
    if job.training.optimizer == "grit" and diagonal:
        yield Warned(
            code="diagonal_is_adam",
            message=f"fisher_approximation is diagonal for {', '.join(diagonal)}: the eigenbasis of"
            " a diagonal factor is the axes themselves, so the step is Adam's. Write kfac to train"
            " in the eigenbasis of the factors.",
        )


def _started(run: TrainingRun) -> TrainingStarted:
    return TrainingStarted(
        total_steps=run.total_steps,
        start_step=run.progress.step,
        device=run.job.device,
        precision=run.job.precision,
        num_rows=len(run.sampler.rows),
        num_eval_rows=len(run.eval_indices),
    )


def _patience_is_over(run: TrainingRun) -> bool:
    patience = run.job.training.early_stopping_patience
    return patience is not None and run.progress.evaluations_without_gain >= patience


def _stopped_early(run: TrainingRun) -> Warned:
    return Warned(
        code="stopped_early",
        message=f"The evaluation loss has not improved in {run.progress.evaluations_without_gain}"
        f" evaluations (best {run.progress.best_eval_loss:.4f}); training ends at step"
        f" {run.progress.step} of {run.total_steps}.",
    )


def _due(run: TrainingRun, every: object) -> bool:
    return isinstance(every, int) and run.progress.step % every == 0


def _save(run: TrainingRun) -> Iterator[TrainingEvent]:
    """Save a checkpoint, unless this very state is saved already.

    One that cannot be written costs the steps since the last one if the run is interrupted, and
    nothing if it is not; so training goes on.
    """
    if run.saved_at_step == run.progress.step:
        return
    checkpoint = run.checkpoint()
    run.saved_at_step = run.progress.step
    if not run.processes.leads:
        return
    try:
        folder = save_checkpoint(run.job.work_dir / "checkpoints", checkpoint)
    except OSError as error:
        yield Warned(
            code="checkpoint_not_saved",
            message=f"The checkpoint of step {checkpoint.step} could not be written"
            f" ({error.strerror or error}); training goes on, and the one before is kept.",
        )
        return
    yield CheckpointSaved(step=run.progress.step, folder=str(folder))


def _evaluate(run: TrainingRun) -> Evaluated:
    progress = run.progress
    loss = evaluate(run)
    progress.eval_loss, progress.evaluated_at_step = loss, progress.step
    if progress.best_eval_loss is None or loss < progress.best_eval_loss:
        progress.best_eval_loss, progress.evaluations_without_gain = loss, 0
    else:
        progress.evaluations_without_gain += 1
    return Evaluated(step=progress.step, eval_loss=loss)
