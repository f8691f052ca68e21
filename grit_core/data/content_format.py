"""How a chat template reads a message: as a list of parts or as a text, found out by rendering.

A template that expects a text writes Python's `repr` of a list, or fails on it; one that expects
a list writes nothing of a text. Each role is probed, because some templates differ by role.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from grit_core.errors import InvalidDataset
from grit_core.records import ImagePart, Message, Role, TextPart

WORD: Final = "Zq7Word7qZ"
"""Occurs in no template; letters and digits only, so that no template changes it."""

_PROBE: Final = f"{WORD}\n{WORD}"
"""A line break is the character that `repr` and JSON write otherwise."""

Render = Callable[[list[dict[str, Any]], bool], str]
"""Renders template messages, with or without a generation prompt; raises `InvalidDataset`."""


class ContentFormat(StrEnum):
    """What a message's `content` is."""

    PARTS = "parts"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class MessageWriter:
    """Writes messages as one template reads them."""

    formats: Mapping[Role, ContentFormat]
    """A role that is missing here cannot be written."""
    image_token: str | None
    shows_images: bool
    """Whether the template writes something for an image of the user."""

    def write(self, message: Message) -> dict[str, Any]:
        """Return the message as the template reads it.

        Raises:
            InvalidDataset: The template writes no text of this role as it is, or no image.
        """
        content_format = self.formats.get(message.role)
        if content_format is None:
            raise InvalidDataset(
                f"the model's chat template does not write the text of a {message.role} message as"
                " it is, neither from a text nor from a list of parts; give the model a chat"
                " template that does"
            )
        if not self.shows_images and any(isinstance(p, ImagePart) for p in message.content):
            raise InvalidDataset(
                "the model's chat template writes nothing for an image; give the model a chat"
                " template that does, or leave images out"
            )
        return {
            "role": message.role.value,
            "content": _content(message, content_format, self.image_token),
        }


def find_message_writer(
    render: Render, *, image_token: str | None, reads_images: bool
) -> MessageWriter:
    """Find out how a template reads messages.

    Args:
        render: Renders with the template.
        image_token: What the processor replaces by an image, where it says so.
        reads_images: Whether to try images; lists of parts come first then.
    """
    order = [ContentFormat.PARTS, ContentFormat.TEXT]
    order = order if reads_images else order[::-1]
    formats: dict[Role, ContentFormat] = {}
    fitting = [each for each in order if _writes(render, Role.USER, each, formats, image_token)]
    # Some templates refuse a question without an image, so this is no subset of the former.
    showing = [each for each in order if reads_images and _shows(render, each, image_token)]
    # A template that refuses every chat is refused with its own words, as below.
    shows_images = bool(showing) or _refuses(render, Role.USER, formats, image_token)
    fitting = showing or fitting
    for role in (Role.USER, Role.ASSISTANT, Role.SYSTEM):
        if role is not Role.USER:
            fitting = [each for each in order if _writes(render, role, each, formats, image_token)]
        # What the template refuses in any form is refused with the template's own words.
        if fitting or _refuses(render, role, formats, image_token):
            formats[role] = (fitting or order)[0]
    return MessageWriter(formats, image_token, shows_images)


def _content(message: Message, content_format: ContentFormat, image_token: str | None) -> Any:
    if content_format is ContentFormat.TEXT:
        return "".join(
            part.text if isinstance(part, TextPart) else str(image_token)
            for part in message.content
        )
    if message.role is Role.ASSISTANT:
        # One part: some templates write a separator after each, which no answer may hold.
        return [{"type": "text", "text": message.text}]
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]


def _chat(
    role: Role, content_format: ContentFormat, formats: Mapping[Role, ContentFormat]
) -> list[tuple[Message, ContentFormat]]:
    """The shortest chat with a probe of one role."""
    probe = (Message(role, (TextPart(_PROBE),)), content_format)
    if role is Role.USER:
        return [probe]
    user_format = formats.get(Role.USER, content_format)
    user = (Message(Role.USER, (TextPart("Hello"),)), user_format)
    return [user, probe] if role is Role.ASSISTANT else [probe, user]


def _try(
    render: Render, chat: Sequence[tuple[Message, ContentFormat]], image_token: str | None
) -> str | None:
    messages = [
        {"role": message.role.value, "content": _content(message, each, image_token)}
        for message, each in chat
    ]
    try:
        return render(messages, chat[-1][0].role is not Role.ASSISTANT)
    except InvalidDataset:
        return None


def _writes(
    render: Render,
    role: Role,
    content_format: ContentFormat,
    formats: Mapping[Role, ContentFormat],
    image_token: str | None,
) -> bool:
    text = _try(render, _chat(role, content_format, formats), image_token)
    return text is not None and text.count(WORD) == text.count(_PROBE) * 2 > 0


def _refuses(
    render: Render, role: Role, formats: Mapping[Role, ContentFormat], image_token: str | None
) -> bool:
    return all(
        _try(render, _chat(role, each, formats), image_token) is None for each in ContentFormat
    )


def _shows(render: Render, content_format: ContentFormat, image_token: str | None) -> bool:
    if content_format is ContentFormat.TEXT and image_token is None:
        return False
    shown = Message(Role.USER, (ImagePart(0), TextPart(_PROBE)))
    with_image = _try(render, [(shown, content_format)], image_token)
    without = _try(render, _chat(Role.USER, content_format, {}), image_token)
    if with_image is None or _PROBE not in with_image:
        return False
    return with_image != without
