"""The rows of a dataset file, encoded on demand and joined to the batches of a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from grit_core.data.collate import Batch, collate_batches
from grit_core.data.encoder import IGNORED, ChatEncoder, EncodedRow
from grit_core.data.processor import follows_tokens
from grit_core.errors import InvalidDataset
from grit_core.library_errors import ran_out_of_memory
from grit_core.records import ChatRecord
from grit_core.row_file import RowFile

CACHE_BYTES: Final = 64 * 1024**2
"""Bound on the processed rows that are kept in memory."""

OVERHEAD_BYTES: Final = 1024
"""Of a kept sequence: its objects, beside the numbers in its tensors."""

MAX_SAID: Final = 300
"""Characters that are quoted of a processor's error."""

_PROCESSOR_ERRORS: Final = (
    *(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError),
    RuntimeError,
)
"""What processors and tokenizers raise about a text or an image that they cannot take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """All that one optimizer step is computed from."""

    batches: tuple[Batch, ...]
    """Micro-batches, whose gradients are added up."""

    num_label_tokens: int
    num_tokens: int
    """Padding left out."""


class RowEncoder:
    """Encodes rows one by one, within the length that a job allows."""

    def __init__(
        self, encoder: ChatEncoder, *, max_length: int, on_long_rows: str = "reject"
    ) -> None:
        """Encode by `encoder`.

        Args:
            encoder: Of the base model.
            max_length: Most tokens of a row, image tokens included.
            on_long_rows: `reject` raises an error, `skip` leaves the row out, `truncate` cuts it
                after `max_length` tokens, when all its images and some label are before that.
        """
        self.encoder = encoder
        self.max_length = max_length
        self.on_long_rows = on_long_rows

    def whole(self, record: ChatRecord, *, place: str) -> tuple[EncodedRow, ...]:
        """Return all sequences of a row, however long.

        Raises:
            InvalidDataset: The row cannot be used; the message begins with `place`.
        """
        with faults_at(place):
            sequences = self.encoder.encode(record)
            if not any((each.labels[1:] != IGNORED).any() for each in sequences):
                raise InvalidDataset(
                    "the assistant's only token is the first of the row, and nothing comes before"
                    " it that it could be predicted from; add a user's message"
                )
        return sequences

    def within(self, sequences: tuple[EncodedRow, ...], *, place: str) -> tuple[EncodedRow, ...]:
        """Return the sequences of a row as the job allows; none when the row is left out.

        One that is too long is an `InvalidDataset` whose message begins with `place`.
        """
        if all(len(each.input_ids) <= self.max_length for each in sequences):
            return sequences
        if self.on_long_rows == "skip":
            return ()
        return tuple(self._shortened(each, place=place) for each in sequences)

    def _shortened(self, row: EncodedRow, *, place: str) -> EncodedRow:
        """Cut a row after `max_length` tokens.

        Raises:
            InvalidDataset: The job does not allow it, or what is left cannot be trained on.
        """
        length, whole = self.max_length, len(row.input_ids)
        if whole <= length:
            return row
        too_long = f"{place}: the row has {whole} tokens and training.max_length is {length}"
        if self.on_long_rows != "truncate":
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
        return EncodedRow(
            input_ids=row.input_ids[:length],
            labels=row.labels[:length],
            features={
                name: values[:, :length] if follows_tokens(values, whole) else values
                for name, values in row.features.items()
            },
            num_cut_tokens=whole - length,
        )


@contextmanager
def faults_at(place: str) -> Iterator[None]:
    """Name the row in what is wrong with it, and what a model's processor raises about it.

    Raises:
        InvalidDataset: The row cannot be used; the message begins with `place`.
    """
    try:
        yield
    except InvalidDataset as error:
        raise InvalidDataset(f"{place}: {error}.") from error
    except _PROCESSOR_ERRORS as error:
        if ran_out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or ["no more is known"])[0][:MAX_SAID]
        raise InvalidDataset(
            f"{place}: the model's processor refuses the row ({type(error).__name__}: {said})."
        ) from error


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
            max_length: As for `RowEncoder`.
            on_long_rows: Likewise.
            cache_bytes: Bound on the memory of the rows that are kept.
        """
        self.file = file
        self.encoder = encoder
        self.row_encoder = RowEncoder(encoder, max_length=max_length, on_long_rows=on_long_rows)
        self._free_bytes = cache_bytes
        self._kept: dict[int, tuple[EncodedRow, ...]] = {}

    def row(self, index: int) -> tuple[EncodedRow, ...]:
        """Return the sequences of one row; none when one is too long and such rows are left out.

        A row that cannot be used is an `InvalidDataset` that names the file and the line.
        """
        if index in self._kept:
            return self._kept[index]
        place = self.file.words(self.file.place(index))
        whole = self.row_encoder.whole(self.file.record(index), place=place)
        sequences = self.row_encoder.within(whole, place=place)
        num_bytes = sum(each.num_bytes + OVERHEAD_BYTES for each in sequences)
        if 0 < num_bytes <= self._free_bytes:
            self._kept[index] = sequences
            self._free_bytes -= num_bytes
        return sequences

    def step_rows(self, indices: Sequence[int], *, batch_size: int) -> StepRows:
        """Encode and pad the given rows as micro-batches of at most `batch_size` sequences.

        Rows that are too long are left out or cut, as the job says: `row_check` has counted them.
        """
        kept = [sequence for index in indices for sequence in self.row(index)]
        return StepRows(
            batches=collate_batches(
                kept, batch_size=batch_size, pad_token_id=self.encoder.pad_token_id
            ),
            # The first token of a row has no position before it to be predicted from.
            num_label_tokens=sum(int((row.labels[1:] != IGNORED).sum()) for row in kept),
            num_tokens=sum(len(row.input_ids) for row in kept),
        )
