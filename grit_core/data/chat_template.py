"""Chats as token ids: the model's own template, and which tokens are the assistant's.

For each assistant turn the template writes the chat before it with a generation prompt, and the
chat up to it; what the whole chat has beyond the first, up to the second, is what the model must
learn to write. That needs no template of ours and no `{% generation %}` marks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import TemplateError

from grit_core.errors import InvalidDataset
from grit_core.records import ImagePart, Message, Role, TextPart

PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Used for tokenizers without a chat template: `User: ...`, `Assistant: ...<eos>`, a line each."""

Span = tuple[int, int]
"""Start and end in characters of a rendered chat."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as the template writes it, image placeholders not yet expanded."""

    text: str
    spans: tuple[Span, ...]
    """The assistant's words with their end-of-turn token, one span for each assistant turn."""

    image_counts: tuple[int, ...]
    """How many images come before the end of each span."""


class ChatRenderer:
    """Renders chats with the template of one processor (or of one tokenizer, for text alone)."""

    def __init__(self, processor: Any) -> None:
        """Take over a processor or tokenizer as `load_processor` returns it."""
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.reads_images = self.tokenizer is not processor
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        special |= {
            str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special
        }
        for name in ("image_token", "video_token", "audio_token"):
            if isinstance(token := getattr(processor, name, None), str):
                special.add(token)
        self._special = re.compile("|".join(re.escape(token) for token in _longest_first(special)))

    def prompt(self, messages: Sequence[Message]) -> str:
        """Render a chat that the assistant is to answer; raises `InvalidDataset` as below."""
        self._check(messages)
        return self._render(messages, add_generation_prompt=True)

    def conversation(self, messages: Sequence[Message]) -> RenderedChat:
        """Render a whole chat and find the assistant's words in it.

        A chat that the template refuses, or whose text holds a control token, is an
        `InvalidDataset`.
        """
        self._check(messages)
        text = self._render(messages)
        spans: list[Span] = []
        counts: list[int] = []
        for index, message in enumerate(messages):
            if message.role is Role.ASSISTANT:
                spans.append(self._span(messages, index, text))
                counts.append(_count_images(messages[:index]))
        if spans and messages[-1].role is Role.ASSISTANT:
            text, spans[-1] = self._with_end_of_turn(text, spans[-1])
        return RenderedChat(text, tuple(spans), tuple(counts))

    def _span(self, messages: Sequence[Message], index: int, text: str) -> Span:
        before = self._render(messages[:index], add_generation_prompt=True) if index else ""
        start = _common_prefix(before, text)
        last = index == len(messages) - 1
        end = len(text) if last else _common_prefix(self._render(messages[: index + 1]), text)
        if end <= start:
            # A template that writes an earlier turn otherwise than the last (dropped thoughts):
            # then the turn ends where the next prompt departs.
            end = _common_prefix(self._render(messages[: index + 2]), text)
        return start, self._end_of_turn(text, start, end)

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """The end of the first special token after words, else of the last character not white."""
        words_seen_at = start
        for match in self._special.finditer(text, start, end):
            if text[words_seen_at : match.start()].strip():
                return match.end()
            words_seen_at = match.end()
        return start + len(text[start:end].rstrip())

    def _with_end_of_turn(self, text: str, span: Span) -> tuple[str, Span]:
        """Add the end-of-sequence token after a last turn whose template writes no end."""
        start, end = span
        tail = [match.end() for match in self._special.finditer(text, start, end)]
        eos = self.tokenizer.eos_token
        if eos is None or (tail and tail[-1] == end):
            return text, span
        return text[:end] + eos, (start, end + len(eos))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            rendered = self.processor.apply_chat_template(
                [self._template_message(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise InvalidDataset(f"the model's chat template refuses the chat: {error}") from error
        return str(rendered)

    def _template_message(self, message: Message) -> dict[str, Any]:
        if not self.reads_images:
            return {"role": message.role.value, "content": message.text}
        parts = [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in message.content
        ]
        return {"role": message.role.value, "content": parts}

    def _check(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if not self.reads_images and any(isinstance(p, ImagePart) for p in message.content):
                raise InvalidDataset("the model reads text alone, and the chat shows an image")
            found = self._special.search(message.text)
            if found:
                raise InvalidDataset(
                    f"the text of the {message.role} holds {found.group()!r}, which the model reads"
                    " as a control token and not as text; remove it or write it otherwise"
                )


def _count_images(messages: Sequence[Message]) -> int:
    return sum(isinstance(part, ImagePart) for message in messages for part in message.content)


def _common_prefix(first: str, second: str) -> int:
    """How many characters the two texts share at their start."""
    if second.startswith(first):
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def _longest_first(tokens: set[str]) -> list[str]:
    return sorted(tokens, key=lambda token: (-len(token), token))
