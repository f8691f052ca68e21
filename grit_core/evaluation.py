"""The loss on rows that are not trained on: the evaluation rows and the retention rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from grit_core.data.rows import EncodedRows
from grit_core.errors import InvalidDataset
from grit_core.events import RetentionEvaluated, TrainingEvent, Warned
from grit_core.loss import label_loss_sum, to_device
from grit_core.training_run import TrainingRun


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutLoss:
    """The loss on some rows, over all processes."""

    mean: float
    """Over the label tokens, nats; 0 when there are none."""

    num_label_tokens: int
    num_skipped: int
    """Rows left out for their length, where the job allows it."""

    num_cut: int
    """Rows cut for their length, likewise."""


@torch.no_grad()
def held_out_loss(run: TrainingRun, rows: EncodedRows, indices: Sequence[int]) -> HeldOutLoss:
    """Return the loss on chosen rows as the model is now; draws no random number.

    Every process takes its share of the rows, so all of them have to call this.
    """
    run.model.eval()
    loss_sum, num_tokens, num_skipped, num_cut = 0.0, 0, 0, 0
    own = run.processes.share(indices)
    for start in range(0, len(own), run.batch_size):
        step = run.stream.on_the_same_thread(own[start : start + run.batch_size], rows=rows)
        for batch in step.batches:
            with run.autocast():
                loss_sum += float(label_loss_sum(run.model, to_device(batch, run.device)))
        num_tokens += step.num_label_tokens
        num_skipped += len(step.skipped_lines)
        num_cut += len(step.cut_lines)
    run.model.train()
    sums = torch.tensor([loss_sum, num_tokens, num_skipped, num_cut], dtype=torch.float64)
    run.processes.add_up(sums)
    loss_sum, *counts = sums.tolist()
    num_tokens, num_skipped, num_cut = (int(count) for count in counts)
    return HeldOutLoss(
        mean=loss_sum / max(1, num_tokens),
        num_label_tokens=num_tokens,
        num_skipped=num_skipped,
        num_cut=num_cut,
    )


def evaluate(run: TrainingRun) -> float:
    """Return the mean loss over the label tokens of the evaluation rows."""
    return held_out_loss(run, run.eval_rows, run.eval_indices).mean


def retention_before(run: TrainingRun) -> Iterator[TrainingEvent]:
    """Measure the base model on the retention rows, once a job: B is zero before the first step.

    A resumed run has the number from its checkpoint.

    Raises:
        InvalidDataset: No retention row has a label token within the job's `max_length`.
    """
    rows, progress = run.retention_rows, run.progress
    if rows is None or progress.retention_loss_before is not None:
        return
    found = held_out_loss(run, rows, range(len(rows.file)))
    name, length = rows.file.path.name, run.job.training.max_length
    if found.num_label_tokens == 0:
        raise InvalidDataset(
            f"{name}: every row is longer than training.max_length ({length} tokens) and was left"
            " out, so there is no retention loss; raise max_length or shorten the rows."
        )
    if found.num_skipped or found.num_cut:
        yield Warned(
            code="retention_rows_shortened",
            message=f"Of the {len(rows.file)} retention rows in {name}, {found.num_skipped} were"
            f" left out and {found.num_cut} cut: they are longer than {length} tokens.",
        )
    progress.retention_loss_before = found.mean
    yield RetentionEvaluated(step=progress.step, when="before", loss=found.mean)


def retention_after(run: TrainingRun) -> Iterator[TrainingEvent]:
    """Measure the model as it is exported on the retention rows."""
    rows, progress = run.retention_rows, run.progress
    if rows is None:
        return
    loss = held_out_loss(run, rows, range(len(rows.file))).mean
    progress.retention_loss_after = loss
    yield RetentionEvaluated(step=progress.step, when="after", loss=loss)
