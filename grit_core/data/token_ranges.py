"""Which tokens of an encoded chat are an answer's: found by encoding prefixes, and verified.

No offsets are needed, so every tokenizer will do. An answer starts after the tokens of its prompt.
Where the tokenizer would join the prompt's end and the answer's start to one token, the answer is
encoded by itself, because that is what a model writes after a prompt that ends there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from grit_core.data.answer_placement import PlacedAnswer
from grit_core.data.conversation import Answer, RenderedChat
from grit_core.data.processor import ProcessorInputs, follows_tokens
from grit_core.errors import InvalidDataset

_ANCHORS: Final = ("\n", ":", "a", "1", "。")
"""Texts after which another is encoded as in the middle of a chat, not as at its start."""


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """A text as the model reads it."""

    ids: list[int]
    """Image placeholders expanded."""
    features: dict[str, Tensor]
    """What else the processor made."""
    ranges: tuple[tuple[int, int], ...]
    """Start and end of each answer's tokens."""
    unplaced: tuple[Answer, ...]
    """Earlier answers whose tokens are others here than after their own prompt."""


class TokenRanges:
    """Encodes rendered chats with one processor, and finds the answers among the tokens."""

    def __init__(self, tokenizer: Any, inputs: ProcessorInputs) -> None:
        """Encode with a processor and its tokenizer."""
        self._tokenizer = tokenizer
        self._inputs = inputs

    def encode(self, chat: RenderedChat, images: Sequence[Image.Image]) -> LabelledTokens:
        """Encode a chat.

        Args:
            chat: The text.
            images: Of its messages, in order.

        Raises:
            InvalidDataset: The last answer cannot be found among the tokens.
        """
        whole, rest, plain, before = self._divide(chat)
        features = self._inputs(whole, images)
        ids = features.pop("input_ids")[0].tolist()
        features.pop("attention_mask", None)
        features = {
            name: _extended(values, len(ids), len(rest)) for name, values in features.items()
        }
        ids += rest
        moved = len(ids) - len(plain)
        start = len(before) + moved
        if ids[start:] != plain[len(before) :]:
            raise InvalidDataset("the assistant's words cannot be found among the tokens")
        placed = [
            (answer, self._range(answer, plain=plain, ids=ids, images=images))
            for answer in chat.answers[:-1]
        ]
        ranges = [found for _, found in placed if found is not None]
        return LabelledTokens(
            ids=ids,
            features=features,
            ranges=(*ranges, (start, len(ids))),
            unplaced=tuple(answer for answer, found in placed if found is None),
        )

    def count_plain(self, chat: RenderedChat) -> int:
        """Return the number of tokens of a chat before its images are expanded.

        A chat whose last answer cannot be separated from its prompt raises `InvalidDataset`.
        """
        _, _, plain, _ = self._divide(chat)
        return len(plain)

    def _divide(self, chat: RenderedChat) -> tuple[str, list[int], list[int], list[int]]:
        """Return the text that the processor encodes, the ids after it, all ids, the prompt's."""
        last = chat.answers[-1].placed
        prompt, before = self._begin(last)
        plain = self._plain(chat.text)
        if plain[: len(before)] == before:
            return chat.text, [], plain, before
        rest = before[len(prompt) :] + self._plain_after(last.answer + last.end)
        return last.prompt, rest, prompt + rest, before

    def _range(
        self, answer: Answer, *, plain: list[int], ids: list[int], images: Sequence[Image.Image]
    ) -> tuple[int, int] | None:
        """Return the range of an earlier answer; none when its own chat has other tokens."""
        placed = answer.placed
        until = placed.before + placed.answer + placed.history_end
        _, before = self._begin(placed)
        whole = self._plain(until)
        if whole[: len(before)] != before or plain[: len(whole)] != whole:
            return None
        if answer.num_images == len(images):
            start = len(before) + len(ids) - len(plain)
        else:
            # How an image is expanded may depend on the number of images.
            shown = images[: answer.num_images]
            expanded = self._inputs(placed.before, shown)["input_ids"][0].tolist()
            start = len(expanded)
            if ids[:start] != expanded:
                return None
        end = start + len(whole) - len(before)
        return (start, end) if ids[start:end] == whole[len(before) :] else None

    def _begin(self, placed: PlacedAnswer) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt, and of everything before the first label."""
        prompt = self._plain(placed.prompt)
        if not placed.header:
            return prompt, prompt
        before = self._plain(placed.before)
        if before[: len(prompt)] != prompt:
            before = prompt + self._plain_after(placed.header)
        return prompt, before

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _plain_after(self, text: str) -> list[int]:
        """Return the ids of a text in the middle of a chat, joined to nothing before it.

        Raises:
            InvalidDataset: The tokenizer joins it to whatever comes before.
        """
        for anchor in _ANCHORS:
            first, both = self._plain(anchor), self._plain(anchor + text)
            if both[: len(first)] == first:
                return both[len(first) :]
        raise InvalidDataset(
            "the tokenizer joins the start of an answer to the text before it, so its tokens cannot"
            f" be separated from the prompt's; begin the answer otherwise than with {text[:8]!r}"
        )


def _extended(values: Tensor, length: int, more: int) -> Tensor:
    """Give a feature that holds a value per token `more` tokens like the last one."""
    if not follows_tokens(values, length):
        return values
    return torch.cat([values, values[:, -1:].expand(-1, more, *values.shape[2:])], dim=1)
