"""Encoded rows padded to one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from grit_core.data.encoder import IGNORED, EncodedRow
from grit_core.data.processor import follows_tokens

CROSS_ATTENTION_MASK: Final = "cross_attention_mask"
"""Which tokens attend to which images, `(1, tokens, images, tiles)`."""


PACKED_IMAGES: Final = "pixel_values"
PACKED_SIZES: Final = "target_sizes"
"""Beside this feature, the images of a whole batch are one, side by side along the last axis
(MiniCPM-V 4.6); its lines tell where each ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows that go through the model together."""

    inputs: dict[str, Tensor]
    """The model's arguments; `input_ids` and `attention_mask` are `(rows, tokens)`."""

    labels: Tensor
    """`(rows, tokens)`."""

    label_columns: Tensor | None = None
    """`label_columns(labels)`, known while the labels are on the CPU: on a device the host would
    have to wait for it. Without it the loss finds them itself."""

    def map(self, copy: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with every tensor replaced by what a function makes of it."""
        return Batch(
            inputs={name: copy(tensor) for name, tensor in self.inputs.items()},
            labels=copy(self.labels),
            label_columns=None if self.label_columns is None else copy(self.label_columns),
        )


def label_columns(labels: Tensor) -> Tensor:
    """Return the columns, from 0, whose next token is a label in some row: all that a loss reads.

    Args:
        labels: `(rows, tokens)`.
    """
    return (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)


def collate_batches(
    rows: Sequence[EncodedRow], *, batch_size: int, pad_token_id: int
) -> tuple[Batch, ...]:
    """Pad rows to batches of at most `batch_size`, each of rows that may share one.

    A model that attends to images in layers of its own (Mllama) lets a token that sees no image
    attend to all that are there, padding included. With other images beside it such a row has
    another loss than on its own, so there rows with equally many images share a batch.
    """
    groups: dict[int, list[EncodedRow]] = {}
    for row in rows:
        groups.setdefault(_attended_images(row), []).append(row)
    return tuple(
        collate(group[start : start + batch_size], pad_token_id=pad_token_id)
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    )


def collate(rows: Sequence[EncodedRow], *, pad_token_id: int) -> Batch:
    """Pad rows on the right to the longest and join their features.

    Features with a value for each token are padded like the token ids; all others are joined along
    their first dimension, smaller ones filled up with zeros (which the models that need it leave
    out again), or along their last one where the model takes images side by side.

    Args:
        rows: Of one model.
        pad_token_id: Fills up the token ids.

    Raises:
        ValueError: The rows may not share a batch; see `collate_batches`.
    """
    attended = sorted({_attended_images(row) for row in rows})
    if len(attended) > 1:
        raise ValueError(f"rows that attend to {attended} images cannot share a batch")
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
    return Batch(inputs=inputs, labels=labels, label_columns=label_columns(labels))


def _attended_images(row: EncodedRow) -> int:
    """The images that layers of their own attend to; 0 in models that have no such layers."""
    mask = row.features.get(CROSS_ATTENTION_MASK)
    return 0 if mask is None else mask.shape[2]


def _joined(name: str, rows: Sequence[EncodedRow], width: int) -> Tensor:
    found = [row for row in rows if name in row.features]
    parts = [row.features[name] for row in found]
    if name == PACKED_IMAGES and PACKED_SIZES in found[0].features:
        return torch.cat(parts, dim=-1)
    of_tokens = all(follows_tokens(row.features[name], len(row.input_ids)) for row in found)
    if of_tokens:
        axes = parts[0].shape[2:]
        parts = [
            row.features.get(name, parts[0].new_zeros(1, len(row.input_ids), *axes)) for row in rows
        ]
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    if of_tokens:
        shape[0] = width
    return torch.cat([_filled_up(part, shape) for part in parts])


def _filled_up(part: Tensor, shape: list[int]) -> Tensor:
    if list(part.shape[1:]) == shape:
        return part
    filled = part.new_zeros([part.shape[0], *shape])
    filled[tuple(slice(size) for size in part.shape)] = part
    return filled


def _padded(values: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - len(values)), value=fill)
