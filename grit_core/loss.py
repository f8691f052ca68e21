"""The loss on label tokens, with logits computed at no other place."""

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grit_core.data.collate import Batch
from grit_core.data.encoder import IGNORED
from grit_core.model_refusals import refusals_named


def label_loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum the cross entropy over a batch's label tokens.

    Args:
        model: A causal model or a VLM, PEFT-wrapped or not; called with the batch's inputs.
        batch: Rows on the model's device.

    Returns:
        A float32 scalar; divide by the number of label tokens of the whole step.
    """
    logits, targets = predictions(model, batch)
    return cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


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
            columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
            return model(**inputs, logits_to_keep=columns).logits, targets[:, columns]
        return model(**inputs).logits[:, :-1], targets


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device."""
    if device.type == "cpu":
        return batch
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.inputs.items()}
    return Batch(inputs=inputs, labels=batch.labels.to(device, non_blocking=True))


def keeps_chosen_logits(model: nn.Module) -> bool:
    """Tell whether the model computes logits only where it is asked to."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
