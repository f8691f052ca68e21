"""A model's own chat template: rendered as inference renders it, and what of it is control text."""

import re
from collections.abc import Sequence
from typing import Any, Final

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from grit_core.data.bos import BosText
from grit_core.data.content_format import MessageWriter, find_message_writer
from grit_core.errors import InvalidDataset, InvalidTurn
from grit_core.records import ImagePart, Message

_PLAIN: Final = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: CONTENT"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_PARTS: Final = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}IMAGE{% endif %}{% endfor %}{% endif %}"
)

PLAIN_TEMPLATE: Final = _PLAIN.replace("CONTENT", "{{ message['content'] }}")
"""Used for tokenizers without a chat template: `User: ...`, `Assistant: ...<eos>`, a line each."""

Span = tuple[int, int]
"""Start and end in characters of a rendered chat."""

_MARK: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

_TEMPLATE_FAULTS: Final = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    RecursionError,
)
"""What a template raises by itself, or by a filter or method that it calls on a value."""


def plain_template(processor: Any) -> str:
    """Return the template for a processor (or tokenizer) without one of its own.

    For a processor, parts are joined and its image token stands where an image does; one that
    names no image token gets a template that refuses images.
    """
    if getattr(processor, "tokenizer", processor) is processor:
        return PLAIN_TEMPLATE
    image_token = getattr(processor, "image_token", None)
    shown = (
        f"{{{{ {str(image_token)!r} }}}}"
        if image_token
        else "{{ raise_exception('the model has no chat template and names no image token') }}"
    )
    return _PLAIN.replace("CONTENT", _PARTS.replace("IMAGE", shown))


class ChatRenderer:
    """Renders chats with the template of one processor (or of one tokenizer, for text only)."""

    def __init__(self, processor: Any) -> None:
        """Take over a processor or tokenizer as `load_processor` returns it."""
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.reads_images = self.tokenizer is not processor
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        special |= {str(token) for token in added if token.special}
        image_token = getattr(processor, "image_token", None)
        self._image_token = image_token if isinstance(image_token, str) else None
        names = ("image_token", "video_token", "audio_token")
        found = (getattr(processor, name, None) for name in names)
        placeholders = {token for token in found if isinstance(token, str)}
        special |= placeholders
        self.control = _alternatives(special)
        """Matches a token that a message may not hold."""
        self.end_tokens = _alternatives(
            special | {str(token) for token in added if str(token).strip()}
        )
        """Matches a token that may end a turn; some tokenizers do not call theirs special."""
        self._bos = BosText(self.tokenizer, placeholders=placeholders)
        source = getattr(processor, "chat_template", None)
        self._source = source.get("default") if isinstance(source, dict) else source
        self.has_marks = bool(self._source and _MARK.search(self._source))
        """Whether the template says itself what the assistant writes."""
        self._writer: MessageWriter | None = None

    def check(self, messages: Sequence[Message]) -> None:
        """Refuse what no template can write.

        Raises:
            InvalidTurn: A text holds a control token, or an image is shown to a text model.
        """
        for turn, message in enumerate(messages):
            if not self.reads_images and any(isinstance(p, ImagePart) for p in message.content):
                detail = "the model reads text only, and the chat shows an image"
                raise InvalidTurn(detail, turn=turn)
            found = self.control.search(message.text)
            if found:
                raise InvalidTurn(
                    f"the text of the {message.role} holds {found.group()!r}, which the model reads"
                    " as a control token and not as text; remove it or write it otherwise",
                    turn=turn,
                )

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return a chat that the assistant is to answer; raises `InvalidDataset` as below."""
        self.check(messages)
        return self.render(messages, add_generation_prompt=True)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the chat as the template writes it, BOS first where the tokenizer wants it.

        A chat that the template refuses raises `InvalidDataset`.
        """
        written = [self.writer.write(message) for message in messages]
        return self.render_written(written, add_generation_prompt)

    def marks(self, messages: Sequence[Message], text: str) -> tuple[Span, ...]:
        """Return what the template marks as the assistant's.

        Args:
            messages: The chat.
            text: As `render` returned it, without a generation prompt.

        Raises:
            InvalidDataset: The template refuses the chat, or writes it otherwise than in `text`.
        """
        options = self.tokenizer.special_tokens_map
        written = [self.writer.write(message) for message in messages]
        try:
            rendered, marks = render_jinja_template(
                [written],
                chat_template=self._source,
                return_assistant_tokens_mask=True,
                **options,
            )
        except _TEMPLATE_FAULTS as error:
            raise InvalidDataset(f"the model's chat template refuses the chat: {error}") from error
        whole = self._bos.begin(rendered[0])
        if whole != text:
            raise InvalidDataset("the model's chat template writes a chat in two ways")
        shift = len(whole) - len(rendered[0])
        return tuple((start + shift, end + shift) for start, end in marks[0])

    @property
    def writer(self) -> MessageWriter:
        """How messages are handed to the template; found out once."""
        if self._writer is None:
            self._writer = find_message_writer(
                self.render_written, image_token=self._image_token, reads_images=self.reads_images
            )
        return self._writer

    def render_written(
        self,
        written: list[dict[str, Any]],
        add_generation_prompt: bool,  # noqa: FBT001 - `Render`
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """Return a chat of messages as the template reads them, BOS first where it is wanted.

        Raises:
            InvalidDataset: The template refuses the chat or the tools.
        """
        try:
            rendered = self.processor.apply_chat_template(
                written,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **({} if tools is None else {"tools": tools}),
            )
        except _TEMPLATE_FAULTS as error:
            raise InvalidDataset(f"the model's chat template refuses the chat: {error}") from error
        return self._bos.begin(str(rendered))


def _alternatives(tokens: set[str]) -> re.Pattern[str]:
    """Match one of the tokens, the longest first; none when there are none."""
    longest_first = sorted(tokens - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
