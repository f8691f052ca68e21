"""Chat rows as token ids, labels on the assistant's words, and image features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from grit_core.data.chat_template import ChatRenderer, RenderedChat
from grit_core.data.image_decoding import decode_image
from grit_core.data.processor import ProcessorInputs
from grit_core.errors import InvalidDataset
from grit_core.records import ChatRecord, Message

IGNORED: Final = -100
"""The label of a token that has no part in the loss."""


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


class ChatEncoder:
    """Turns chat records into token ids, labels and features with one model's processor."""

    def __init__(self, processor: Any) -> None:
        """Take over a processor (or tokenizer) as `load_processor` returns it."""
        self.renderer = ChatRenderer(processor)
        self.inputs = ProcessorInputs(processor)
        self._tokenizer = self.renderer.tokenizer
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else self._tokenizer.eos_token_id or 0
        image_token = getattr(processor, "image_token", None)
        image_tokens = [image_token] if isinstance(image_token, str) else []
        self.image_token_ids = torch.tensor(
            self._tokenizer.convert_tokens_to_ids(image_tokens), dtype=torch.long
        )

    def encode(self, record: ChatRecord) -> tuple[EncodedRow, ...]:
        """Encode one row with its labels: as one sequence, or as several that share no text.

        Raises:
            InvalidDataset: The row cannot be written with this model's template, an image cannot be
                decoded, or no token is the assistant's.
        """
        chat = self.renderer.conversation(record.messages)
        images = [decode_image(image, index=index) for index, image in enumerate(record.images)]
        features = self.inputs(chat.text, images)
        input_ids = features.pop("input_ids")[0]
        features.pop("attention_mask", None)
        labels = torch.full_like(input_ids, IGNORED)
        for start, end in self._label_ranges(chat, images, input_ids.tolist()):
            labels[start:end] = input_ids[start:end]
        if not (labels != IGNORED).any():
            raise InvalidDataset("no token of the row is the assistant's")
        return (EncodedRow(input_ids=input_ids, labels=labels, features=features),)

    def encode_prompt(
        self, messages: Sequence[Message], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Encode a chat for the assistant to answer, exactly as in training, as a batch of one."""
        return self.inputs(self.renderer.prompt(messages), images)

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
                expanded = self.inputs(text, images[:image_count])["input_ids"][0].tolist()
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
