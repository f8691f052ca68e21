"""Chat rows as token ids, labels on the assistant's words, and image features."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from grit_core.data.answer_placement import AnswerPlacer
from grit_core.data.chat_template import ChatRenderer
from grit_core.data.conversation import Answer, RenderedChat, render_conversation
from grit_core.data.end_of_turn import EndOfTurn, find_end_of_turn
from grit_core.data.image_decoding import decode_image
from grit_core.data.processor import choose_inputs, find_image_token_ids
from grit_core.data.token_ranges import TokenRanges
from grit_core.data.tool_chat import ToolChat
from grit_core.errors import InvalidDataset
from grit_core.records import ChatRecord, Message
from grit_core.tools.call_format import CallFormat
from grit_core.tools.definitions import Tool

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
        self.placer = AnswerPlacer(self.renderer)
        self.inputs = choose_inputs(processor)
        self.tokenizer = self.renderer.tokenizer
        self._ranges = TokenRanges(self.tokenizer, self.inputs)
        pad = self.tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else self.tokenizer.eos_token_id or 0
        self.image_token_ids = find_image_token_ids(processor)

    def encode(self, record: ChatRecord) -> tuple[EncodedRow, ...]:
        """Encode one row with its labels: as one sequence, or as several that share no text.

        What `render` refuses, an image that cannot be decoded, and an answer that cannot be found
        among the tokens raise `InvalidDataset`.
        """
        chats = list(self.render(record))
        images = [decode_image(image, index=index) for index, image in enumerate(record.images)]
        rows = []
        while chats:
            row, unplaced = self._encode_chat(chats.pop(), images)
            rows.append(row)
            chats += [RenderedChat((answer,)) for answer in unplaced]
        return tuple(reversed(rows))

    def render(self, record: ChatRecord) -> tuple[RenderedChat, ...]:
        """Return the texts of one row, with their answers placed and no image decoded.

        Raises:
            InvalidDataset: The row cannot be written with this model's template, or no token is
                the assistant's.
        """
        self.renderer.check(record.messages)
        chats = render_conversation(self.placer, record.messages)
        if not chats:
            raise InvalidDataset("no token of the row is the assistant's")
        return chats

    def count_plain_tokens(self, chat: RenderedChat) -> int:
        """Return the number of tokens of a rendered chat before its images are expanded.

        A chat whose last answer cannot be separated from its prompt raises `InvalidDataset`.
        """
        return self._ranges.count_plain(chat)

    def encode_prompt(
        self, messages: Sequence[Message], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Encode a chat for the assistant to answer, exactly as in training, as a batch of one."""
        return self.inputs(self.renderer.prompt(messages), images)

    def encode_tool_prompt(
        self, messages: Sequence[Message], images: Sequence[Image.Image], tools: Sequence[Tool]
    ) -> tuple[dict[str, Tensor], CallFormat]:
        """Encode a chat with tools, or with calls of tools, for the assistant to answer.

        Returns:
            The model's arguments as a batch of one, and how the answer writes calls.
        """
        prompt = self.tool_chat.prompt(messages, tools)
        return self.inputs(prompt.text, images), prompt.calls

    @cached_property
    def tool_chat(self) -> ToolChat:
        """Conversations with tools."""
        return ToolChat(self.renderer, self.placer)

    @cached_property
    def blank_before_answers(self) -> str:
        """White space that the model writes before an answer because its chat template does.

        Empty when the generation prompt holds it, and for a template that refuses a plain chat.
        """
        try:
            return self.placer.blank()
        except InvalidDataset:
            return ""

    @cached_property
    def end_of_turn(self) -> EndOfTurn:
        """What ends a turn of the assistant."""
        return find_end_of_turn(self.placer)

    def _encode_chat(
        self, chat: RenderedChat, images: Sequence[Image.Image]
    ) -> tuple[EncodedRow, tuple[Answer, ...]]:
        """Return a text with its labels, and the answers that need a text of their own."""
        tokens = self._ranges.encode(chat, images[: chat.num_images])
        input_ids = torch.tensor(tokens.ids)
        labels = torch.full_like(input_ids, IGNORED)
        for start, end in tokens.ranges:
            labels[start:end] = input_ids[start:end]
        features = self.inputs.mark_answers(tokens.features, labels != IGNORED)
        row = EncodedRow(input_ids=input_ids, labels=labels, features=features)
        return row, tokens.unplaced
