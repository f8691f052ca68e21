"""Dataset rows: the one reader of the chat format, used by the upload check and by the trainer.

A row is an object `{"messages": [...]}` in the OpenAI chat shape. Image parts are written as
`{"type": "image_url", "image_url": {"url": "data:..." | "relative/path.png"}}`, or as
`{"type": "image"}` in the order of an `images` column (Hugging Face). No image library is needed
here: bytes are taken as they are and told apart by their first bytes alone.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, Final

from grit_core.errors import InvalidDataset
from grit_core.images import (
    MAX_IMAGE_BYTES,
    data_url,
    decode_data_url,
    describe_format,
    is_data_url,
    media_type,
)
from grit_core.json_text import InvalidJson, decode, has_lone_surrogate, pointer_of

MAX_LINE_BYTES: Final = 64 * 1024**2
"""Longest line of a JSONL file: a row with its images inside."""
MAX_MESSAGES: Final = 64
MAX_IMAGES: Final = 32
MAX_TEXT_CHARACTERS: Final = 1_000_000

ResolveImage = Callable[[str], bytes]
"""Returns the bytes of an image named by a relative path; raises `LookupError` if there is none."""

_TEXT_CONTROL: Final = frozenset(chr(code) for code in range(32)) - {"\t", "\n", "\r", "\f"}

_Path = tuple[str | int, ...]


class Role(StrEnum):
    """Who speaks in a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


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
    """Of an answer: 1 to learn it, 0 to read it as context only."""

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
        return {"role": message.role.value, "content": parts}


@dataclass(frozen=True, slots=True)
class RowFault:
    """One thing wrong with one row: where, a stable code, and what to do."""

    line: int
    pointer: str
    code: str
    detail: str
    image: int | None = None
    """Index of the image in the row, when the fault is one image's."""


class InvalidRecord(InvalidDataset):
    """A row cannot be used; `row_faults` holds everything that is wrong with it."""

    def __init__(self, row_faults: tuple[RowFault, ...]) -> None:
        lines = [
            f"line {fault.line}, {fault.pointer or '/'}: {fault.detail}" for fault in row_faults
        ]
        super().__init__("\n".join(lines))
        self.row_faults = row_faults


def parse_line(data: bytes, *, line: int, resolve_image: ResolveImage) -> ChatRecord:
    """Read one line of JSONL (as `parse_record`, from bytes, with strict JSON).

    Raises:
        InvalidRecord: If the line is too long, is not strict JSON, or is not a usable row.
    """
    if len(data) > MAX_LINE_BYTES:
        detail = f"The line has {len(data)} bytes; at most {MAX_LINE_BYTES} are read."
        raise InvalidRecord((RowFault(line, "", "line_too_long", detail),))
    try:
        value = decode(data)
    except InvalidJson as error:
        fault = RowFault(line, error.pointer, error.code, error.detail)
        raise InvalidRecord((fault,)) from None
    return parse_record(value, line=line, resolve_image=resolve_image)


def parse_record(value: Any, *, line: int, resolve_image: ResolveImage) -> ChatRecord:
    """Read one row.

    Args:
        value: The decoded JSON (or Parquet) row.
        line: Its number in the file, from 1, for messages.
        resolve_image: Finds the bytes of images that the row names by a relative path.

    Raises:
        InvalidRecord: With every fault of the row, not the first alone.
    """
    reader = _RowReader(line=line, resolve_image=resolve_image)
    messages = reader.row(value)
    if reader.faults:
        raise InvalidRecord(tuple(reader.faults))
    return ChatRecord(
        line=line,
        messages=messages,
        images=tuple(reader.images),
        ignored_columns=tuple(sorted(reader.ignored)),
    )


def parse_prompt(messages: Any) -> ChatRecord:
    """Read a chat that the assistant is to answer: as a row, without an assistant's turn to learn.

    Args:
        messages: The decoded list of turns; images as data URLs.

    Raises:
        InvalidRecord: With every fault of the chat.
    """
    reader = _RowReader(line=1, resolve_image=no_images, needs_answer=False)
    read = reader.row({"messages": messages})
    if reader.faults:
        raise InvalidRecord(tuple(reader.faults))
    return ChatRecord(line=1, messages=read, images=tuple(reader.images))


def read_records(path: Path) -> Iterator[ChatRecord]:
    """Yield the rows of a local JSONL file; relative image paths start at its folder.

    The first row that cannot be used ends it with `InvalidRecord`.
    """
    resolve = images_beside(path)
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            if data.strip():
                yield parse_line(data.rstrip(b"\r\n"), line=line, resolve_image=resolve)


def images_beside(path: Path) -> ResolveImage:
    """Return a reader of images in the folder of a local dataset file, and never outside of it."""
    folder = path.resolve().parent

    def resolve(name: str) -> bytes:
        found = (folder / name).resolve()
        if not found.is_relative_to(folder) or not found.is_file():
            raise LookupError(name)
        return found.read_bytes()

    return resolve


def no_images(name: str) -> bytes:
    """Resolve nothing: for canonical rows, and for uploads of a bare JSONL file.

    Raises:
        LookupError: Always.
    """
    raise LookupError(name)


class _RowReader:
    """Reads one row and collects all that is wrong with it."""

    def __init__(
        self, *, line: int, resolve_image: ResolveImage, needs_answer: bool = True
    ) -> None:
        self.line = line
        self.needs_answer = needs_answer
        self.resolve_image = resolve_image
        self.faults: list[RowFault] = []
        self.images: list[bytes] = []
        self.ignored: set[str] = set()
        self._column: list[Any] | None = None
        self._taken = 0
        self._seen = 0

    def fault(self, path: _Path, code: str, detail: str, *, image: int | None = None) -> None:
        self.faults.append(RowFault(self.line, pointer_of(path), code, detail, image))

    def row(self, value: Any) -> tuple[Message, ...]:
        if not isinstance(value, dict):
            self.fault((), "type_invalid", f"A row is an object; this is {_kind(value)}.")
            return ()
        self.ignored = {str(key) for key in value if key not in {"messages", "images"}}
        self._read_column(value.get("images"))
        messages = value.get("messages")
        if not isinstance(messages, list) or not messages:
            what = "is missing" if messages is None else f"is {_kind(messages)}"
            self.fault(
                ("messages",), "row_invalid", f"`messages` {what}; a row needs a list of turns."
            )
            return ()
        if len(messages) > MAX_MESSAGES:
            detail = f"The row has {len(messages)} messages; at most {MAX_MESSAGES} are read."
            self.fault(("messages",), "row_invalid", detail)
            return ()
        read = [self._message(item, ("messages", index)) for index, item in enumerate(messages)]
        self._check_whole(read)
        return tuple(message for message in read if message is not None)

    def _read_column(self, column: Any) -> None:
        if column is None:
            return
        if isinstance(column, list):
            self._column = column
        else:
            self.fault(("images",), "type_invalid", f"`images` is {_kind(column)}; write a list.")

    def _check_whole(self, messages: list[Message | None]) -> None:
        if self._column is not None and self._taken != len(self._column):
            self.fault(
                ("images",),
                "image_count_mismatch",
                f"The row has {len(self._column)} images and {self._taken} `image` parts;"
                " write one part for every image.",
            )
        if None in messages:
            return
        roles = [message.role for message in messages if message is not None]
        if self.needs_answer and Role.ASSISTANT not in roles:
            self.fault(
                ("messages",), "row_invalid", "No message is the assistant's: nothing to learn."
            )
        for index, role in enumerate(roles):
            if role is Role.SYSTEM and index > 0:
                detail = "A system message may only come first."
                self.fault(("messages", index, "role"), "row_invalid", detail)

    def _message(self, value: Any, path: _Path) -> Message | None:
        if not isinstance(value, dict):
            self.fault(path, "type_invalid", f"A message is an object; this is {_kind(value)}.")
            return None
        before = len(self.faults)
        for key in value:
            if key not in {"role", "content"}:
                self.fault(
                    (*path, str(key)), "field_unknown", "A message has `role` and `content`."
                )
        role = self._role(value.get("role"), (*path, "role"))
        content = self._content(value.get("content"), role, (*path, "content"))
        if role is None or len(self.faults) > before:
            return None
        return Message(role=role, content=content)

    def _role(self, value: Any, path: _Path) -> Role | None:
        if isinstance(value, str) and value in set(Role):
            return Role(value)
        shown = repr(value[:40]) if isinstance(value, str) else _kind(value)
        self.fault(path, "row_invalid", f"The role is {shown}; use {', '.join(Role)}.")
        return None

    def _content(
        self, value: Any, role: Role | None, path: _Path
    ) -> tuple[TextPart | ImagePart, ...]:
        if isinstance(value, str):
            value = [{"type": "text", "text": value}]
            text_at: Callable[[int], _Path] = lambda _: path  # noqa: E731 - one of two spellings of a place
        elif isinstance(value, list):
            text_at = lambda index: (*path, index)  # noqa: E731 - see above
        else:
            detail = f"`content` is {_kind(value)}; write a text or a list of parts."
            self.fault(path, "type_invalid", detail)
            return ()
        parts = [self._part(item, role, text_at(index)) for index, item in enumerate(value)]
        kept = tuple(part for part in parts if part is not None)
        written = any(isinstance(part, ImagePart) or part.text.strip() for part in kept)
        if not written and len(kept) == len(parts):
            self.fault(path, "row_invalid", "The message is empty; write text or an image.")
        return kept

    def _part(self, value: Any, role: Role | None, path: _Path) -> TextPart | ImagePart | None:
        if not isinstance(value, dict):
            self.fault(path, "type_invalid", f"A part is an object; this is {_kind(value)}.")
            return None
        kind = value.get("type")
        # Parquet stores every part with every column: absent ones come back as null.
        keys = {str(key) for key, item in value.items() if item is not None} - {"type"}
        if kind == "text":
            self._refuse_keys(keys - {"text"}, path, "text")
            return self._text(value.get("text"), path)
        if not isinstance(kind, str) or kind not in {"image_url", "image"}:
            shown = repr(kind[:40]) if isinstance(kind, str) else _kind(kind)
            detail = f"The part's type is {shown}; use text, image_url or image."
            self.fault((*path, "type"), "row_invalid", detail)
            return None
        self._refuse_keys(keys - {"image_url"} if kind == "image_url" else keys, path, kind)
        if role not in {None, Role.USER}:
            self.fault(
                path, "row_invalid", f"An image in a message of the {role}; only users show images."
            )
        image = self._seen
        self._seen += 1
        if image >= MAX_IMAGES:
            detail = f"The row has more than {MAX_IMAGES} images."
            self.fault(path, "image_count_mismatch", detail, image=image)
            return None
        found = (
            self._url(value, path, image) if kind == "image_url" else self._from_column(path, image)
        )
        return self._keep(found, path, image)

    def _refuse_keys(self, keys: set[str], path: _Path, kind: str) -> None:
        for key in sorted(keys):
            self.fault((*path, key), "field_unknown", f"A part of type {kind} has no such field.")

    def _text(self, text: Any, path: _Path) -> TextPart | None:
        at = (*path, "text")
        if not isinstance(text, str):
            self.fault(at, "type_invalid", f"`text` is {_kind(text)}; write a text.")
        elif len(text) > MAX_TEXT_CHARACTERS:
            detail = f"The text has {len(text)} characters; at most {MAX_TEXT_CHARACTERS} are read."
            self.fault(at, "out_of_range", detail)
        elif has_lone_surrogate(text) or not _TEXT_CONTROL.isdisjoint(text):
            detail = "The text holds a control character or half of a surrogate pair."
            self.fault(at, "string_invalid", detail)
        else:
            return TextPart(text)
        return None

    def _url(self, value: dict[Any, Any], path: _Path, image: int) -> bytes | None:
        holder = value.get("image_url")
        at = (*path, "image_url")
        url = holder
        if isinstance(holder, dict):
            extra = {str(key) for key, item in holder.items() if item is not None} - {
                "url",
                "detail",
            }
            self._refuse_keys(extra, at, "image_url")
            url, at = holder.get("url"), (*at, "url")
        if not isinstance(url, str):
            self.fault(at, "type_invalid", f"The URL is {_kind(url)}; write a text.", image=image)
            return None
        return self._named(url, at, image)

    def _named(self, url: str, path: _Path, image: int) -> bytes | None:
        """Return the bytes behind a data URL or a relative path."""
        if is_data_url(url):
            try:
                return decode_data_url(url)
            except ValueError as error:
                self.fault(path, "image_corrupt", str(error), image=image)
                return None
        if "://" in url or url.startswith("//"):
            detail = "Images are never fetched; send a data URL, or a file of the same archive."
            self.fault(path, "image_url_not_allowed", detail, image=image)
            return None
        if not is_safe_path(url):
            detail = "An image path is relative, with / between names and no `..`."
            self.fault(path, "image_path_invalid", detail, image=image)
            return None
        try:
            return self.resolve_image(url)
        except LookupError:
            detail = f"The image {url[:200]!r} is not among the files of the dataset."
            self.fault(path, "image_missing", detail, image=image)
            return None

    def _from_column(self, path: _Path, image: int) -> bytes | None:
        index = self._taken
        self._taken += 1
        if self._column is None or index >= len(self._column):
            if self._column is None:
                detail = "An `image` part takes from the row's `images` list, which is missing."
                self.fault(path, "image_count_mismatch", detail, image=image)
            return None
        item = self._column[index]
        at: _Path = ("images", index)
        if isinstance(item, dict) and item.get("bytes") is None:
            item = item.get("path")
        elif isinstance(item, dict):
            item = item["bytes"]
        if isinstance(item, bytes):
            return item
        if isinstance(item, str):
            return self._named(item, at, image)
        detail = f"The image is {_kind(item)}; write a data URL or a relative path."
        self.fault(at, "type_invalid", detail, image=image)
        return None

    def _keep(self, found: bytes | None, path: _Path, image: int) -> ImagePart | None:
        if found is None:
            return None
        if len(found) > MAX_IMAGE_BYTES:
            detail = f"The image has {len(found)} bytes; at most {MAX_IMAGE_BYTES} are read."
            self.fault(path, "image_too_large", detail, image=image)
        elif media_type(found) is None:
            self.fault(path, "image_format_not_allowed", describe_format(found), image=image)
        else:
            self.images.append(found)
            return ImagePart(len(self.images) - 1)
        return None


def is_safe_path(name: str) -> bool:
    """Tell whether a name is a relative path that stays where it starts, on every system."""
    if not name or len(name.encode(errors="replace")) > 255 or "\\" in name or ":" in name:
        return False
    if has_lone_surrogate(name) or any(ord(character) < 32 for character in name):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()


def _kind(value: Any) -> str:
    """Name a JSON type with its article."""
    names: dict[type, str] = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
