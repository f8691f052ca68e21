"""The `image` or `images` column of a row, and where its images go in the messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from grit_core.records.chat import MARKER, ImagePart, Message, Role, TextPart
from grit_core.records.faults import is_empty

NAMES: Final = ("images", "image")


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """The images of a row, in order."""

    name: str
    items: tuple[Any, ...]
    """With the nulls of the file, so that an `index` counts as it was written."""
    is_list: bool

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions of the items that are images."""
        return tuple(index for index, item in enumerate(self.items) if not is_empty(item))

    def path(self, position: int) -> tuple[str | int, ...]:
        """Return where in the row an item stands."""
        return (self.name, position) if self.is_list else (self.name,)


def read_column(row: dict[Any, Any], name: str) -> ImageColumn | None:
    """Return a row's column of that name; one image is taken as a list of one."""
    value = row.get(name)
    if value is None or (is_empty(value) and not isinstance(value, list)):
        return None
    if isinstance(value, (list, tuple)):
        return ImageColumn(name, tuple(value), is_list=True)
    return ImageColumn(name, (value,), is_list=False)


def count_markers(messages: Sequence[Message]) -> int:
    """Return how many `<image>` markers the users' texts hold."""
    return sum(
        part.text.count(MARKER)
        for message in messages
        if message.role is Role.USER
        for part in message.content
        if isinstance(part, TextPart)
    )


def replace_markers(
    messages: Sequence[Message], show_next: Callable[[], ImagePart]
) -> tuple[Message, ...]:
    """Return the messages with an image part for every `<image>` marker of a user."""
    return tuple(
        replace(message, content=tuple(_split(message, show_next)))
        if message.role is Role.USER
        else message
        for message in messages
    )


def _split(message: Message, show_next: Callable[[], ImagePart]) -> list[TextPart | ImagePart]:
    parts: list[TextPart | ImagePart] = []
    for part in message.content:
        if isinstance(part, ImagePart):
            parts.append(part)
            continue
        first, *rest = part.text.split(MARKER)
        parts += [TextPart(first)] if first or not rest else []
        for text in rest:
            parts.append(show_next())
            parts += [TextPart(text)] if text else []
    return parts


def place_first(messages: Sequence[Message], images: Sequence[ImagePart]) -> tuple[Message, ...]:
    """Return the messages with the images before the words of the first user."""
    placed = list(messages)
    for turn, message in enumerate(messages):
        if message.role is Role.USER:
            placed[turn] = replace(message, content=(*images, *message.content))
            break
    return tuple(placed)
