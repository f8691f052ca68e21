"""Reads the messages and columns of one row, and collects all that is wrong with it."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Final

from grit_core.images import MAX_IMAGE_BYTES, describe_format, media_type
from grit_core.json_text import has_lone_surrogate, pointer_of
from grit_core.records.chat import (
    MARKER,
    ROW_ROLES,
    ChatRecord,
    ImagePart,
    Message,
    Role,
    TextPart,
)
from grit_core.records.columns import unread_columns
from grit_core.records.faults import InvalidRecord, Path, RowFault, kind_name, shown_name
from grit_core.records.foreign_formats import foreign_format, is_sharegpt
from grit_core.records.image_columns import (
    NAMES,
    ImageColumn,
    count_markers,
    place_first,
    read_column,
    replace_markers,
)
from grit_core.records.image_files import ResolveImage
from grit_core.records.image_values import FACTS, SOURCES, ImageValues
from grit_core.records.message_fields import (
    IGNORED,
    fields,
    fix_for_field,
    fix_for_part,
    fix_for_role,
    switched_off,
)

MAX_MESSAGES: Final = 64
"""Of a row that is trained on: the chat before each of its answers is rendered."""
MAX_CHAT_MESSAGES: Final = 1024
"""Of a chat to go on with, which is rendered once."""
MAX_IMAGES: Final = 32
MAX_TEXT_CHARACTERS: Final = 1_000_000

_TEXT_CONTROL: Final = frozenset(chr(code) for code in range(32)) - {"\t", "\n", "\r", "\f"}
_ROLES: Final = frozenset(ROW_ROLES)
_MESSAGE_FIELDS: Final = frozenset({"role", "content", "weight"})
_TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text"})
_IMAGE_PARTS: Final = frozenset({"image", "image_url", "input_image"})
_UNTYPED: Final = {"text": "text", "image": "image", "image_url": "image_url"}
"""The type of a part that names none (Qwen's way), by its one key."""


class RowReader:
    """Reads one row and collects all that is wrong with it."""

    def __init__(
        self, *, line: int, resolve_image: ResolveImage, needs_answer: bool = True
    ) -> None:
        self.line = line
        self.needs_answer = needs_answer
        self.resolve_image = resolve_image
        self.faults: list[RowFault] = []
        self.images: list[bytes] = []
        self.pointers: list[str] = []
        self.ignored: set[str] = set()
        self._column: ImageColumn | None = None
        self._shown: list[int] = []
        """Positions of the column that parts have taken."""
        self._indexed: set[bool] = set()
        """Whether the parts that take from the column say which image."""
        self._seen = 0
        self._placed = 0

    def _fault(self, path: Path, code: str, detail: str, *, image: int | None = None) -> None:
        self.faults.append(RowFault(self.line, pointer_of(path), code, detail, image))

    def read(self, value: Any) -> ChatRecord:
        """Return the row.

        Raises:
            InvalidRecord: With every fault.
        """
        messages = self._row(value)
        if self.faults:
            raise InvalidRecord(tuple(self.faults))
        return ChatRecord(
            line=self.line,
            messages=messages,
            images=tuple(self.images),
            ignored_columns=tuple(sorted(self.ignored)),
            image_pointers=tuple(self.pointers),
            num_placed_images=self._placed,
        )

    # --- the row

    def _row(self, value: Any) -> tuple[Message, ...]:
        if not isinstance(value, dict):
            self._fault((), "type_invalid", f"A row is an object; this is {kind_name(value)}.")
            return ()
        messages = value.get("messages")
        if not isinstance(messages, list) or not messages or is_sharegpt(messages):
            self._refuse_messages(value, messages)
            return ()
        most = MAX_MESSAGES if self.needs_answer else MAX_CHAT_MESSAGES
        if len(messages) > most:
            detail = f"The row has {len(messages)} messages; at most {most} are read."
            self._fault(("messages",), "row_invalid", detail)
            return ()
        self._read_column(value)
        each = [self._message(item, ("messages", index)) for index, item in enumerate(messages)]
        read = tuple(message for message in each if message is not None)
        if len(read) == len(each):
            read = self._place_images(read)
            self._check_roles(read)
        self._check_column()
        self._check_columns(value, read)
        return read

    def _refuse_messages(self, row: dict[Any, Any], messages: Any) -> None:
        known = foreign_format(row)
        if known is not None:
            at: Path = () if known.column is None else (known.column,)
            self._fault(at, "format_not_supported", known.detail)
            return
        what = "is missing" if messages is None else f"is {kind_name(messages)}"
        what = "is an empty list" if messages == [] else what
        what += " (write the list itself, not its JSON)" if isinstance(messages, str) else ""
        detail = f"`messages` {what}; a row needs a list of turns."
        self._fault(("messages",), "row_invalid", detail)

    def _read_column(self, row: dict[Any, Any]) -> None:
        found = [column for name in NAMES if (column := read_column(row, name)) is not None]
        if len(found) > 1:
            detail = "The row has `image` and `images`; put all its images into `images`."
            self._fault(("image",), "column_not_supported", detail)
        elif found:
            self._column = found[0]

    def _check_roles(self, messages: tuple[Message, ...]) -> None:
        roles = [message.role for message in messages]
        answers = [message for message in messages if message.role is Role.ASSISTANT]
        if self.needs_answer and not answers:
            self._fault(
                ("messages",), "row_invalid", "No message is the assistant's: nothing to learn."
            )
        elif self.needs_answer and all(message.weight == 0 for message in answers):
            detail = "Every message of the assistant has weight 0: nothing to learn."
            self._fault(("messages",), "row_invalid", detail)
        for index, role in enumerate(roles):
            if role is Role.SYSTEM and index > 0:
                detail = "A system message may only come first."
                self._fault(("messages", index, "role"), "row_invalid", detail)

    def _check_columns(self, row: dict[Any, Any], messages: tuple[Message, ...]) -> None:
        refused, ignored = unread_columns(row, messages, shows_images=self._seen > 0)
        self.ignored.update(ignored)
        for name, detail in refused.items():
            self._fault((name,), "column_not_supported", detail)

    # --- images of the column

    def _place_images(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Put the images of the column where `<image>` markers are, or first.

        Only where no part of a message is an image: parts say themselves where images go.
        """
        column = self._column
        if column is None or self._seen or not column.positions:
            return messages
        num_markers = count_markers(messages)
        detail = _placing_fault(messages, len(column.positions), num_markers)
        if detail is not None:
            self._fault((column.name,), "image_count_mismatch", detail)
            return messages
        shown = [self._take(position) for position in column.positions]
        if None in shown:
            return messages
        parts = [part for part in shown if part is not None]
        if num_markers:
            return replace_markers(messages, partial(next, iter(parts)))
        self._placed = len(parts)
        return place_first(messages, parts)

    def _take(self, position: int) -> ImagePart | None:
        """Read an image of the column."""
        if self._column is None:
            return None
        self._shown.append(position)
        path = self._column.path(position)
        image = self._seen
        self._seen += 1
        return self._keep(self._values(image).read(self._column.items[position], path), path, image)

    def _check_column(self) -> None:
        column = self._column
        known = any(fault.code == "image_count_mismatch" for fault in self.faults)
        if column is None or self._placed or known or (self.faults and not self._seen):
            return
        if len(self._indexed) > 1:
            detail = "Some `image` parts have an `index` and some have none; give it to all."
            self._fault((column.name,), "image_count_mismatch", detail)
            return
        if set(self._shown) != set(column.positions):
            self._fault(
                (column.name,),
                "image_count_mismatch",
                f"The row has {len(column.positions)} images and {len(self._shown)} `image` parts"
                " that take from them; write one part for every image.",
            )

    # --- messages

    def _message(self, value: Any, path: Path) -> Message | None:
        if not isinstance(value, dict):
            self._fault(
                path, "type_invalid", f"A message is an object; this is {kind_name(value)}."
            )
            return None
        before = len(self.faults)
        others = {key: value[key] for key in value.keys() - _MESSAGE_FIELDS}
        given = fields(others)
        meant, unread = switched_off(others)
        given |= meant
        self.ignored.update(f"messages.{name}" for name in unread)
        for name in sorted(given):
            if name in IGNORED:
                self.ignored.add(f"messages.{name}")
            else:
                self._fault((*path, name), "field_unknown", fix_for_field(name))
        role = self._role(value.get("role"), (*path, "role"))
        weight = self._weight(value.get("weight"), role, (*path, "weight"))
        content = self._content(value.get("content"), role, (*path, "content"))
        if role is None or len(self.faults) > before:
            return None
        return Message(role=role, content=content, weight=weight)

    def _role(self, value: Any, path: Path) -> Role | None:
        if isinstance(value, str) and value in _ROLES:
            return Role(value)
        shown = repr(value[:40]) if isinstance(value, str) else kind_name(value)
        fix = fix_for_role(value) if isinstance(value, str) else ""
        detail = f"The role is {shown}; use {', '.join(ROW_ROLES)}. {fix}".rstrip()
        self._fault(path, "row_invalid", detail)
        return None

    def _weight(self, value: Any, role: Role | None, path: Path) -> int:
        """Return OpenAI's weight of a message: 1 to learn it, 0 to read it only."""
        if value is None:
            return 1
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value not in {0, 1}:
            shown = f"{value:g}" if is_number else kind_name(value)
            self._fault(path, "out_of_range", f"The weight is {shown}; write 0 or 1.")
        elif role is not Role.ASSISTANT:
            detail = "Only the assistant's messages are learned and have a weight; drop the field."
            self._fault(path, "row_invalid", detail)
        return int(value == 1)

    def _content(
        self, value: Any, role: Role | None, path: Path
    ) -> tuple[TextPart | ImagePart, ...]:
        if isinstance(value, str):
            value = [{"type": "text", "text": value}]
            text_at: Callable[[int], Path] = lambda _: path  # noqa: E731 - one of two spellings of a place
        elif isinstance(value, list):
            text_at = lambda index: (*path, index)  # noqa: E731 - see above
        else:
            detail = f"`content` is {kind_name(value)}; write a text or a list of parts."
            self._fault(path, "type_invalid", detail)
            return ()
        parts = [self._part(item, role, text_at(index)) for index, item in enumerate(value)]
        kept = tuple(part for part in parts if part is not None)
        written = any(isinstance(part, ImagePart) or part.text.strip() for part in kept)
        # In a chat to go on with, only the user has to have said something.
        may_be_empty = not self.needs_answer and role is not Role.USER
        if not written and not may_be_empty and len(kept) == len(parts):
            self._fault(path, "row_invalid", "The message is empty; write text or an image.")
        return kept

    # --- parts

    def _part(self, value: Any, role: Role | None, path: Path) -> TextPart | ImagePart | None:
        if not isinstance(value, dict):
            self._fault(path, "type_invalid", f"A part is an object; this is {kind_name(value)}.")
            return None
        kind = value.get("type")
        if kind == "text" and len(value) == 2 and "text" in value:  # nearly every part
            return self._text(value.get("text"), path)
        given = fields(value)
        given.pop("type", None)
        if kind is None and len(given) == 1:
            kind = _UNTYPED.get(next(iter(given)))
        if isinstance(kind, str) and kind in _TEXT_PARTS:
            self._refuse_keys(given.keys() - {"text"}, path, kind)
            return self._text(value.get("text"), path)
        if not isinstance(kind, str) or kind not in _IMAGE_PARTS:
            shown = repr(kind[:40]) if isinstance(kind, str) else kind_name(kind)
            fix = fix_for_part(kind) if isinstance(kind, str) else ""
            detail = f"The part's type is {shown}; use text, image_url or image. {fix}".rstrip()
            self._fault((*path, "type"), "row_invalid", detail)
            return None
        return self._image_part(value, kind, role, path)

    def _image_part(
        self, value: dict[Any, Any], kind: str, role: Role | None, path: Path
    ) -> ImagePart | None:
        given = fields(value)
        self._refuse_keys(given.keys() - {"type", "index", *SOURCES, *FACTS}, path, kind)
        if role not in {None, Role.USER}:
            self._fault(
                path, "row_invalid", f"An image in a message of the {role}; only users show images."
            )
        image = self._seen
        if image >= MAX_IMAGES:
            detail = f"The row has more than {MAX_IMAGES} images."
            self._fault(path, "image_count_mismatch", detail, image=image)
            return None
        if kind == "image" and not any(name in given for name in SOURCES):
            return self._part_of_column(given.get("index"), path, image)
        self._seen += 1
        if "index" in given:
            detail = "The part has an image of its own and an `index`; drop one of the two."
            self._fault((*path, "index"), "field_unknown", detail, image=image)
        return self._keep(self._own_image(value, kind, path, image), path, image)

    def _own_image(self, value: dict[Any, Any], kind: str, path: Path, image: int) -> bytes | None:
        if kind == "image":
            return self._values(image).read_part(value, path)
        holder, at = value.get("image_url"), (*path, "image_url")
        if isinstance(holder, dict):
            extra = fields(holder).keys() - {"url", *FACTS}
            self._refuse_keys(extra, at, "image_url")
            holder, at = holder.get("url"), (*at, "url")
        if not isinstance(holder, str):
            detail = f"The URL is {kind_name(holder)}; write a text."
            self._fault(at, "type_invalid", detail, image=image)
            return None
        return self._values(image).read(holder, at)

    def _part_of_column(self, index: Any, path: Path, image: int) -> ImagePart | None:
        """Return the next image of the column, or the one that the part's `index` picks."""
        column = self._column
        self._indexed.add(index is not None)
        if column is None:
            self._seen += 1
            detail = (
                "An `image` part without an image of its own takes from the row's `images` (or"
                " `image`), which is missing."
            )
            self._fault(path, "image_count_mismatch", detail, image=image)
            return None
        if index is None:
            left = column.positions[len(self._shown) :]
            if left:
                return self._take(left[0])
            self._seen += 1
            self._shown.append(-1)
            return None
        if isinstance(index, bool) or index not in column.positions:
            self._seen += 1
            shown = str(index) if isinstance(index, (int, float)) else kind_name(index)
            detail = (
                f"The part's `index` is {shown} and the row has {len(column.items)} images, from 0;"
                " null images count and cannot be shown."
            )
            self._fault((*path, "index"), "image_count_mismatch", detail, image=image)
            return None
        return self._take(int(index))

    def _refuse_keys(self, keys: AbstractSet[str], path: Path, kind: str) -> None:
        for key in sorted(keys):
            detail = f"A part of type {kind} has no field {shown_name(key)!r}; drop it."
            self._fault((*path, key), "field_unknown", detail)

    def _text(self, text: Any, path: Path) -> TextPart | None:
        at = (*path, "text")
        if not isinstance(text, str):
            self._fault(at, "type_invalid", f"`text` is {kind_name(text)}; write a text.")
        elif len(text) > MAX_TEXT_CHARACTERS:
            detail = f"The text has {len(text)} characters; at most {MAX_TEXT_CHARACTERS} are read."
            self._fault(at, "out_of_range", detail)
        elif has_lone_surrogate(text) or not _TEXT_CONTROL.isdisjoint(text):
            detail = "The text holds a control character or half of a surrogate pair."
            self._fault(at, "string_invalid", detail)
        else:
            return TextPart(text)
        return None

    def _values(self, image: int) -> ImageValues:
        return ImageValues(self.resolve_image, partial(self._fault, image=image))

    def _keep(self, found: bytes | None, path: Path, image: int) -> ImagePart | None:
        if found is None:
            return None
        if len(found) > MAX_IMAGE_BYTES:
            detail = f"The image has {len(found)} bytes; at most {MAX_IMAGE_BYTES} are read."
            self._fault(path, "image_too_large", detail, image=image)
        elif media_type(found) is None:
            self._fault(path, "image_format_not_allowed", describe_format(found), image=image)
        else:
            self.images.append(found)
            self.pointers.append(pointer_of(path))
            return ImagePart(len(self.images) - 1)
        return None


def _placing_fault(messages: Sequence[Message], num_images: int, num_markers: int) -> str | None:
    """Return why a column's images cannot be placed in messages without image parts, if so."""
    if num_images > MAX_IMAGES:
        return f"The row has {num_images} images; at most {MAX_IMAGES} are read."
    if num_markers not in {0, num_images}:
        return (
            f"The row has {num_images} images and {num_markers} {MARKER} markers in the user's"
            " texts; write one marker for every image, or none at all."
        )
    if all(message.role is not Role.USER for message in messages):
        return "The row has images and no message of a user that could show them."
    return None
