"""A dataset row as the trainer reads it: messages of text and image parts."""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from grit_core.images import data_url
from grit_core.tools.definitions import ToolCall

MARKER: Final = "<image>"
"""Where LLaVA's way of writing puts an image into a text."""


class Role(StrEnum):
    """Who speaks in a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    """The result of a call; in conversations to answer, not in dataset rows."""


ROW_ROLES: Final = (Role.SYSTEM, Role.USER, Role.ASSISTANT)
"""Roles of a dataset row."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """Written words."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture: the `index`-th of the record's images."""

    index: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; its parts keep the order in which they were written."""

    role: Role
    content: tuple[TextPart | ImagePart, ...]
    weight: int = 1
    """0 for an assistant's turn that is context only and not learned."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Of the assistant, after the text."""
    tool_call_id: str = ""
    """Of a tool's message: the call that it answers."""

    @property
    def text(self) -> str:
        """The message's text parts, joined."""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """One row: its messages, and the encoded bytes (PNG, JPEG, WebP) of its images in order."""

    line: int
    messages: tuple[Message, ...]
    images: tuple[bytes, ...] = field(repr=False)
    ignored_columns: tuple[str, ...] = ()
    """Columns of the row that no part of the service reads, such as an `id`."""
    image_pointers: tuple[str, ...] = field(default=(), compare=False)
    """Where in the row each image was written, as JSON pointers."""
    num_placed_images: int = field(default=0, compare=False)
    """Images of a column that no part or marker places: put before the first user's words."""

    @property
    def keeps_markers(self) -> bool:
        """Whether a user's text still holds `<image>`, which no image has taken the place of."""
        users = (message for message in self.messages if message.role is Role.USER)
        return any(MARKER in message.text for message in users)

    def to_json(self) -> dict[str, Any]:
        """Return the canonical row: list content, every image inside as a `data:` URL."""
        return {"messages": [self._message_to_json(message) for message in self.messages]}

    def to_line(self) -> bytes:
        """Return the canonical row as one line of JSONL, newline included."""
        text = json.dumps(self.to_json(), ensure_ascii=False, separators=(",", ":"))
        return text.encode() + b"\n"

    def _message_to_json(self, message: Message) -> dict[str, Any]:
        parts: list[dict[str, Any]] = []
        for part in message.content:
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
            else:
                url = {"url": data_url(self.images[part.index])}
                parts.append({"type": "image_url", "image_url": url})
        written = {"role": message.role.value, "content": parts}
        return written if message.weight == 1 else {**written, "weight": message.weight}
