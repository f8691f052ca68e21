"""Encoded rows padded to one batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grit_core.data.encoder import IGNORED, EncodedRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows that go through the model together."""

    inputs: dict[str, Tensor]
    """The model's arguments; `input_ids` and `attention_mask` are `(rows, tokens)`."""

    labels: Tensor
    """`(rows, tokens)`."""


def collate(rows: Sequence[EncodedRow], *, pad_token_id: int) -> Batch:
    """Pad rows on the right to the longest and join their features.

    Features as long as the token ids are padded like them; all others are joined along their first
    dimension, smaller ones filled up with zeros (which the models that need it leave out again).
    """
    width = max(len(row.input_ids) for row in rows)
    inputs = {
        "input_ids": torch.stack([_padded(row.input_ids, width, pad_token_id) for row in rows]),
        "attention_mask": torch.stack([
            _padded(torch.ones_like(row.input_ids), width, 0) for row in rows
        ]),
    }
    for name in dict.fromkeys(name for row in rows for name in row.features):
        inputs[name] = _joined(name, rows, width)
    labels = torch.stack([_padded(row.labels, width, IGNORED) for row in rows])
    return Batch(inputs=inputs, labels=labels)


def _joined(name: str, rows: Sequence[EncodedRow], width: int) -> Tensor:
    if all(
        name not in row.features or row.features[name].shape == (1, len(row.input_ids))
        for row in rows
    ):
        blank = [torch.zeros_like(row.input_ids) for row in rows]
        found = [
            row.features.get(name, zero[None])[0] for row, zero in zip(rows, blank, strict=True)
        ]
        return torch.stack([_padded(values, width, 0) for values in found])
    parts = [row.features[name] for row in rows if name in row.features]
    shape = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    return torch.cat([_filled_up(part, shape) for part in parts])


def _filled_up(part: Tensor, shape: list[int]) -> Tensor:
    if list(part.shape[1:]) == shape:
        return part
    filled = part.new_zeros([part.shape[0], *shape])
    filled[tuple(slice(size) for size in part.shape)] = part
    return filled


def _padded(values: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - len(values)), value=fill)
