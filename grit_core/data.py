"""Rows to batches: token ids, labels on the assistant's words alone, image features, padding.

A batch is a pure function of the dataset, the seed and the step. Rows are processed one at a time
and may be kept, so that an epoch that fits the cache is processed once.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from grit_core.chat import ChatRenderer, RenderedChat
from grit_core.errors import InvalidDataset
from grit_core.records import ChatRecord, Message
from grit_core.row_file import RowFile
from grit_core.sampler import Sampler

IGNORED: Final = -100
"""The label of a token that has no part in the loss."""

CACHE_BYTES: Final = 64 * 1024**2
"""Bound on the processed rows that are kept in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """One chat as the model reads it."""

    input_ids: Tensor
    """`(tokens,)`, image placeholders expanded."""

    labels: Tensor
    """`(tokens,)`: the token itself where the assistant writes it, else -100."""

    features: dict[str, Tensor]
    """What else the processor made (pixel values and the like), as for a batch of one."""

    num_cut_tokens: int = 0
    """Tokens cut off the end, where the job allows it."""

    @property
    def num_bytes(self) -> int:
        """Memory held by the tensors."""
        tensors = [self.input_ids, self.labels, *self.features.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows that go through the model together."""

    inputs: dict[str, Tensor]
    """The model's arguments; `input_ids` and `attention_mask` are `(rows, tokens)`."""

    labels: Tensor
    """`(rows, tokens)`."""


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


class ChatEncoder:
    """Turns chat records into token ids, labels and features with one model's processor."""

    def __init__(self, processor: Any) -> None:
        """Take over a processor (or tokenizer) as `load_processor` returns it."""
        self.renderer = ChatRenderer(processor)
        self._processor = processor
        self._tokenizer = self.renderer.tokenizer
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else self._tokenizer.eos_token_id or 0
        image_token = getattr(processor, "image_token", None)
        image_tokens = [image_token] if isinstance(image_token, str) else []
        self.image_token_ids = torch.tensor(
            self._tokenizer.convert_tokens_to_ids(image_tokens), dtype=torch.long
        )

    def encode(self, record: ChatRecord) -> EncodedRow:
        """Encode one row with its labels.

        Raises:
            InvalidDataset: The row cannot be written with this model's template, an image cannot be
                decoded, or no token is the assistant's.
        """
        chat = self.renderer.conversation(record.messages)
        images = [decode_image(image, index=index) for index, image in enumerate(record.images)]
        features = self._features(chat.text, images)
        input_ids = features.pop("input_ids")[0]
        features.pop("attention_mask", None)
        labels = torch.full_like(input_ids, IGNORED)
        for start, end in self._label_ranges(chat, images, input_ids.tolist()):
            labels[start:end] = input_ids[start:end]
        if not (labels != IGNORED).any():
            raise InvalidDataset("no token of the row is the assistant's")
        return EncodedRow(input_ids=input_ids, labels=labels, features=features)

    def encode_prompt(
        self, messages: Sequence[Message], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Encode a chat for the assistant to answer, exactly as in training, as a batch of one."""
        return self._features(self.renderer.prompt(messages), images)

    def _features(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        options: dict[str, Any] = {"return_tensors": "pt"}
        if not self.renderer.reads_images:
            return dict(self._tokenizer(text, add_special_tokens=False, **options))
        bos = self._tokenizer.bos_token
        if bos and text.startswith(bos):
            options["add_special_tokens"] = False
        shown = [list(images)] if images else None
        return dict(self._processor(text=[text], images=shown, **options))

    def _label_ranges(
        self, chat: RenderedChat, images: Sequence[Image.Image], ids: list[int]
    ) -> Iterator[tuple[int, int]]:
        """Yield the token ranges of the chat's spans among the expanded `ids`.

        The processor expands image placeholders only, so from the end of the chat back to its last
        image the expanded ids are the plain ones. A span before a later image is placed by
        expanding the chat up to the span's end alone.

        Raises:
            InvalidDataset: The processor has changed more than the image placeholders.
        """
        for (start, end), image_count in zip(chat.spans, chat.image_counts, strict=True):
            if image_count == len(images):
                text, expanded = chat.text, ids
            else:
                text = chat.text[:end]
                expanded = self._features(text, images[:image_count])["input_ids"][0].tolist()
            plain, first, last = self._plain_range(text, start, end)
            tail = len(plain) - first
            moved = len(expanded) - len(plain)
            same_tail = expanded[len(expanded) - tail :] == plain[first:]
            same_head = ids[: len(expanded)] == expanded
            if tail > len(expanded) or not (same_tail and same_head):
                raise InvalidDataset("the assistant's words cannot be found among the tokens")
            yield first + moved, last + moved

    def _plain_range(self, text: str, start: int, end: int) -> tuple[list[int], int, int]:
        """Return the ids of `text` without expansion, and the token range that covers a span.

        Raises:
            InvalidDataset: No token lies in the span.
        """
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoding["offset_mapping"]
        covered = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and a < b]
        if not covered:
            raise InvalidDataset("no token of an assistant message is left")
        return list(encoding["input_ids"]), covered[0], covered[-1] + 1


def decode_image(data: bytes, *, index: int) -> Image.Image:
    """Decode one image to RGB; `index` names it in the error.

    Raises:
        InvalidDataset: The bytes are no image, or are cut off.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InvalidDataset(f"image {index} cannot be decoded: {reason}") from error


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
        self._kept: dict[int, EncodedRow] = {}

    def row(self, index: int) -> EncodedRow | None:
        """Return one row; `None` when it is too long and such rows are left out.

        Raises:
            InvalidDataset: The row cannot be used; the message names the file and the line.
        """
        if index in self._kept:
            return self._kept[index]
        place = f"{self.file.path.name}, line {self.file.places[index].line}"
        record = self.file.record(index)
        try:
            row = self.encoder.encode(record)
        except InvalidDataset as error:
            raise InvalidDataset(f"{place}: {error}.") from error
        if len(row.input_ids) > self._max_length:
            if self._on_long_rows == "skip":
                return None
            row = self._shortened(row, place=place)
        if row.num_bytes <= self._free_bytes:
            self._kept[index] = row
            self._free_bytes -= row.num_bytes
        return row

    def _lines(self, indices: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.file.places[index].line for index in indices)

    def _shortened(self, row: EncodedRow, *, place: str) -> EncodedRow:
        """Cut a row after `max_length` tokens.

        Raises:
            InvalidDataset: The job does not allow it, or what is left cannot be trained on.
        """
        length = self._max_length
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
        kept = [row for row in rows.values() if row is not None]
        batches = [
            collate(kept[start : start + batch_size], pad_token_id=self.encoder.pad_token_id)
            for start in range(0, len(kept), batch_size)
        ]
        return StepRows(
            batches=tuple(batches),
            # The first token of a row has no position before it to be predicted from.
            num_label_tokens=sum(int((row.labels[1:] != IGNORED).sum()) for row in kept),
            num_tokens=sum(len(row.input_ids) for row in kept),
            skipped_lines=self._lines(index for index, row in rows.items() if row is None),
            cut_lines=self._lines(i for i, row in rows.items() if row and row.num_cut_tokens),
        )


class StepStream:
    """The rows of step after step, the next step's made ready on a thread meanwhile."""

    def __init__(self, rows: EncodedRows, sampler: Sampler, *, batch_size: int) -> None:
        """Read `rows` in the order of `sampler`, in micro-batches of `batch_size` rows."""
        self._rows = rows
        self._sampler = sampler
        self._batch_size = batch_size
        # One thread, because tokenizers are not made to be shared by two.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grit-rows")
        self._next: tuple[int, Future[StepRows]] | None = None

    def rows_of(self, step: int, *, last: bool = False) -> StepRows:
        """Return the rows of step `step` (from 0) and begin with the next, unless `last`."""
        future = self._next[1] if self._next and self._next[0] == step else self._begin(step)
        ready = future.result()
        self._next = None if last else (step + 1, self._begin(step + 1))
        return ready

    def on_the_same_thread(self, indices: Sequence[int], *, rows: EncodedRows) -> StepRows:
        """Encode other rows (those of the evaluation) without a second user of the tokenizer."""
        size = self._batch_size
        return self._thread.submit(rows.step_rows, indices, batch_size=size).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int) -> Future[StepRows]:
        indices = self._sampler.rows_of(step)
        return self._thread.submit(self._rows.step_rows, indices, batch_size=self._batch_size)
