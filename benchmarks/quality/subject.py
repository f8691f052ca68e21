"""`Subject`: a pretrained model, a task to move it to, and what it should not forget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from grit_core.config import ModelGRITConfig
from grit_core.data.collate import Batch, collate
from grit_core.data.encoder import IGNORED, EncodedRow
from grit_core.loss import label_loss_sum


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Everything that the methods have in common on one task; rows are encoded and in memory."""

    name: str
    title: str
    base_model: Callable[[], nn.Module]
    """A fresh float32 model each time."""

    config: ModelGRITConfig
    """Which layers adapt, with which rank and alpha; no dropout, no projection."""

    train_rows: Sequence[EncodedRow]
    selection_rows: Sequence[EncodedRow]
    """The learning rate is chosen on these."""

    report_rows: Sequence[EncodedRow]
    """What is published is measured on these, with seeds that chose nothing."""

    retention_rows: Sequence[EncodedRow]
    """What the model could do before."""

    pad_token_id: int
    batch_size: int
    num_steps: int
    eval_every: int
    targets: tuple[float, float, float]
    """Evaluation losses, fixed in advance: see `benchmarks.quality.pilot`."""

    def batch(self, rows: Sequence[EncodedRow]) -> Batch:
        """Collate rows."""
        return collate(rows, pad_token_id=self.pad_token_id)

    def order(self, seed: int) -> list[list[int]]:
        """The rows of every step, by seed alone: the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        flat: list[int] = []
        while len(flat) < self.num_steps * self.batch_size:
            flat += torch.randperm(len(self.train_rows), generator=generator).tolist()
        return [
            flat[step * self.batch_size : (step + 1) * self.batch_size]
            for step in range(self.num_steps)
        ]

    @torch.no_grad()
    def loss(self, model: nn.Module, rows: Sequence[EncodedRow]) -> float:
        """Mean loss over the label tokens of some rows."""
        training = model.training
        model.eval()
        total, num_tokens = 0.0, 0
        for start in range(0, len(rows), _EVAL_BATCH):
            batch = self.batch(rows[start : start + _EVAL_BATCH])
            total += float(label_loss_sum(model, batch))
            num_tokens += num_label_tokens(batch)
        model.train(training)
        return total / num_tokens


_EVAL_BATCH = 75


def num_label_tokens(batch: Batch) -> int:
    """Count the tokens that the loss is a mean over."""
    return int((batch.labels[:, 1:] != IGNORED).sum())
