"""The loss on held-out rows."""

import torch

from grit_core.loss import label_loss_sum, to_device
from grit_core.training_run import TrainingRun


@torch.no_grad()
def evaluate(run: TrainingRun) -> float:
    """Return the mean loss over the label tokens of the evaluation rows; draws no random number."""
    run.model.eval()
    total, num_tokens = 0.0, 0
    for start in range(0, len(run.eval_indices), run.batch_size):
        indices = run.eval_indices[start : start + run.batch_size]
        rows = run.stream.on_the_same_thread(indices, rows=run.eval_rows)
        for batch in rows.batches:
            with run.autocast():
                total += float(label_loss_sum(run.model, to_device(batch, run.device)))
        num_tokens += rows.num_label_tokens
    run.model.train()
    return total / max(1, num_tokens)
