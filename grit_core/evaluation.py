"""The loss on rows that are not trained on: the evaluation rows and the retention rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grit_core.data.rows import EncodedRows
from grit_core.errors import InvalidDataset
from grit_core.events import RetentionEvaluated, TrainingEvent
from grit_core.loss import label_loss_sum
from grit_core.training_run import TrainingRun


@torch.no_grad()
def held_out_loss(run: TrainingRun, rows: EncodedRows, indices: Sequence[int]) -> float:
    """Return the mean loss over the label tokens of chosen rows, in nats.

    The model is taken as it is now, and no random number is drawn. Every process takes its share
    of the rows, so all of them have to call this.

    Raises:
        InvalidDataset: There is no label token, and so no loss.
    """
    run.model.eval()
    losses: list[Tensor] = []
    num_tokens = 0
    own = run.processes.share(indices)
    for start in range(0, len(own), run.batch_size):
        step = run.stream.on_the_same_thread(own[start : start + run.batch_size], rows=rows)
        for batch in step.batches:
            with run.autocast():
                losses.append(label_loss_sum(run.model, batch, device=run.device))
        num_tokens += step.num_label_tokens
    run.model.train()
    # Read at the end, so that the host encodes the next rows while the device computes.
    loss_sum = 0.0
    for loss in torch.stack(losses).tolist() if losses else []:
        loss_sum += loss
    sums = torch.tensor([loss_sum, num_tokens], dtype=torch.float64)
    run.processes.add_up(sums)
    loss_sum, total = sums.tolist()
    if not total:
        raise InvalidDataset(
            f"{rows.file.name}: none of the {len(indices)} rows that the loss is measured on has a"
            f" label token within training.max_length ({run.job.training.max_length} tokens)."
        )
    return float(loss_sum / total)


def evaluate(run: TrainingRun) -> float:
    """Return the mean loss over the label tokens of the evaluation rows."""
    return held_out_loss(run, run.eval_rows, run.eval_indices)


def retention_before(run: TrainingRun) -> Iterator[TrainingEvent]:
    """Measure the base model on the retention rows, once a job: B is zero before the first step.

    A resumed run has the number from its checkpoint.
    """
    progress = run.progress
    if run.retention_rows is None or progress.retention_loss_before is not None:
        return
    loss = held_out_loss(run, run.retention_rows, run.retention_indices)
    progress.retention_loss_before = loss
    yield RetentionEvaluated(step=progress.step, when="before", loss=loss)


def retention_after(run: TrainingRun) -> Iterator[TrainingEvent]:
    """Measure the model as it is exported on the retention rows."""
    progress = run.progress
    if run.retention_rows is None:
        return
    loss = held_out_loss(run, run.retention_rows, run.retention_indices)
    progress.retention_loss_after = loss
    yield RetentionEvaluated(step=progress.step, when="after", loss=loss)
