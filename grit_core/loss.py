"""The loss on label tokens, with logits computed at no other place."""

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grit_core import transfer
from grit_core.data.collate import Batch, label_columns
from grit_core.data.encoder import IGNORED
from grit_core.model_refusals import refusals_named
from grit_core.models.shared_length import rope_limit


def label_loss_sum(model: nn.Module, batch: Batch, *, device: torch.device | None = None) -> Tensor:
    """Sum the cross entropy over a batch's label tokens.

    The sum is that of the rows on their own: where the model would compute a short row otherwise
    beside a long one, the two go through it one after the other.

    Args:
        model: A causal model or a VLM, PEFT-wrapped or not; called with the batch's inputs.
        batch: Rows on the model's device; or on the CPU, which saves waits for their lengths.
        device: Where the model lies; none for where the batch does.

    Returns:
        A float32 scalar; divide by the number of label tokens of the whole step.
    """
    device = batch.labels.device if device is None else device
    total = torch.zeros((), device=device)
    for part in _alike(model, batch):
        logits, targets = predictions(model, to_device(part, device))
        total = total + cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
    return total


def predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run a model and return its logits with the tokens that they should predict.

    The vocabulary projection is the largest activation of a small model, so models that accept
    `logits_to_keep` are asked only for the columns in which some row has a label.

    A batch that the model refuses raises `InvalidDataset`, or `InvalidConfig` when its rows are
    longer than the model's positions.

    Args:
        model: A causal model or a VLM, PEFT-wrapped or not; called with the batch's inputs.
        batch: Rows on the model's device.

    Returns:
        Logits `(rows, columns, vocabulary)` and tokens `(rows, columns)`, `IGNORED` where a row has
        no label.
    """
    targets = batch.labels[:, 1:]
    inputs: dict[str, Any] = {**batch.inputs, "use_cache": False}
    with refusals_named(model, batch):
        if keeps_chosen_logits(model):
            columns = batch.label_columns
            if columns is None:
                columns = label_columns(batch.labels)
            return model(**inputs, logits_to_keep=columns).logits, targets[:, columns]
        return model(**inputs).logits[:, :-1], targets


def _alike(model: nn.Module, batch: Batch) -> list[Batch]:
    """Split a batch of text at the length beyond which the model's rotary frequencies change."""
    config: Any = getattr(_base(model), "config", None)
    limit = None if config is None else rope_limit(config.get_text_config())
    if limit is None or any(t.shape != batch.labels.shape for t in batch.inputs.values()):
        return [batch]
    lengths = batch.inputs["attention_mask"].sum(dim=1)
    parts = [rows for rows in (lengths <= limit, lengths > limit) if rows.any()]
    return [batch] if len(parts) == 1 else [_selected(batch, rows, lengths) for rows in parts]


def _selected(batch: Batch, rows: Tensor, lengths: Tensor) -> Batch:
    width = int(lengths[rows].max())
    labels = batch.labels[rows, :width]
    return Batch(
        inputs={name: tensor[rows, :width] for name, tensor in batch.inputs.items()},
        labels=labels,
        label_columns=label_columns(labels),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device; without a wait where the device allows that."""
    return batch.map(lambda tensor: transfer.to_device(tensor, device))


def keeps_chosen_logits(model: nn.Module) -> bool:
    """Tell whether the model computes logits only where it is asked to."""
    return "logits_to_keep" in inspect.signature(_base(model).forward).parameters


def _base(model: nn.Module) -> nn.Module:
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base
