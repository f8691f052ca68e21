"""The rows of a dataset file, encoded on demand and joined to the batches of a step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from grit_core.data.collate import Batch, collate
from grit_core.data.encoder import IGNORED, ChatEncoder, EncodedRow
from grit_core.errors import InvalidDataset
from grit_core.row_file import RowFile

CACHE_BYTES: Final = 64 * 1024**2
"""Bound on the processed rows that are kept in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """All that one optimizer step is computed from."""

    batches: tuple[Batch, ...]
    """Micro-batches, whose gradients are added up."""

    num_label_tokens: int
    num_tokens: int
    """Padding left out."""

    skipped_lines: tuple[int, ...]
    """Rows left out for their length, by line; empty unless the job allows it."""

    cut_lines: tuple[int, ...]
    """Rows cut for their length, likewise."""


class EncodedRows:
    """The rows of one file, encoded on demand; those that fit the cache are encoded once."""

    def __init__(
        self,
        file: RowFile,
        encoder: ChatEncoder,
        *,
        max_length: int,
        on_long_rows: str = "reject",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Read `file` through `encoder`.

        Args:
            file: The dataset.
            encoder: Of the base model.
            max_length: Most tokens of a row, image tokens included.
            on_long_rows: `reject` raises an error, `skip` leaves the row out, `truncate` cuts it
                after `max_length` tokens, when all its images and some label are before that.
            cache_bytes: Bound on the memory of the rows that are kept.
        """
        self.file = file
        self.encoder = encoder
        self._max_length = max_length
        self._on_long_rows = on_long_rows
        self._free_bytes = cache_bytes
        self._kept: dict[int, tuple[EncodedRow, ...]] = {}

    def row(self, index: int) -> tuple[EncodedRow, ...]:
        """Return the sequences of one row; none when one is too long and such rows are left out.

        Raises:
            InvalidDataset: The row cannot be used; the message names the file and the line.
        """
        if index in self._kept:
            return self._kept[index]
        place = f"{self.file.path.name}, line {self.file.places[index].line}"
        record = self.file.record(index)
        try:
            sequences = self.encoder.encode(record)
        except InvalidDataset as error:
            raise InvalidDataset(f"{place}: {error}.") from error
        if any(len(each.input_ids) > self._max_length for each in sequences):
            if self._on_long_rows == "skip":
                return ()
            sequences = tuple(self._shortened(each, place=place) for each in sequences)
        num_bytes = sum(each.num_bytes for each in sequences)
        if num_bytes <= self._free_bytes:
            self._kept[index] = sequences
            self._free_bytes -= num_bytes
        return sequences

    def _lines(self, indices: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.file.places[index].line for index in indices)

    def _shortened(self, row: EncodedRow, *, place: str) -> EncodedRow:
        """Cut a row after `max_length` tokens.

        Raises:
            InvalidDataset: The job does not allow it, or what is left cannot be trained on.
        """
        length = self._max_length
        if len(row.input_ids) <= length:
            return row
        too_long = (
            f"{place}: the row has {len(row.input_ids)} tokens and training.max_length is {length}"
        )
        if self._on_long_rows != "truncate":
            raise InvalidDataset(
                f"{too_long}; raise max_length, shorten the row, or set training.on_long_rows to"
                " skip or truncate."
            )
        images_cut = torch.isin(row.input_ids[length:], self.encoder.image_token_ids).any()
        if images_cut or not (row.labels[1:length] != IGNORED).any():
            raise InvalidDataset(
                f"{too_long}, and cutting it there would cut an image or all of the assistant's"
                " words; raise max_length or shorten the row."
            )
        whole = row.input_ids.shape[0]
        return EncodedRow(
            input_ids=row.input_ids[:length],
            labels=row.labels[:length],
            features={
                name: values[:, :length] if values.shape == (1, whole) else values
                for name, values in row.features.items()
            },
            num_cut_tokens=whole - length,
        )

    def step_rows(self, indices: Sequence[int], *, batch_size: int) -> StepRows:
        """Encode and pad the given rows as micro-batches of at most `batch_size` rows."""
        rows = {index: self.row(index) for index in indices}
        kept = [sequence for sequences in rows.values() for sequence in sequences]
        batches = [
            collate(kept[start : start + batch_size], pad_token_id=self.encoder.pad_token_id)
            for start in range(0, len(kept), batch_size)
        ]
        return StepRows(
            batches=tuple(batches),
            # The first token of a row has no position before it to be predicted from.
            num_label_tokens=sum(int((row.labels[1:] != IGNORED).sum()) for row in kept),
            num_tokens=sum(len(row.input_ids) for row in kept),
            skipped_lines=self._lines(index for index, row in rows.items() if not row),
            cut_lines=self._lines(
                i for i, row in rows.items() if any(each.num_cut_tokens for each in row)
            ),
        )
