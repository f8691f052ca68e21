"""The bytes behind an image, in every form that programs write one."""

import re
from collections.abc import Callable
from typing import Any, Final

from grit_core.images import decode_data_url, is_data_url
from grit_core.records.faults import Path, is_empty, kind_name
from grit_core.records.image_files import ResolveImage, is_safe_path, normalize_path

SOURCES: Final = ("image_url", "image", "url", "path", "base64", "data", "bytes", "source", "src")
"""Keys that hold an image, or name one."""
FACTS: Final = frozenset({
    *("height", "width", "format", "mode", "mime_type", "media_type", "detail", "filename"),
})
"""Keys that say of an image what its bytes say anyway, or what only a remote model reads."""
_BASE64: Final = ("iVBORw0KGgo", "/9j/", "UklGR")
"""How the base64 of a PNG, a JPEG and a WebP begins."""
_MIN_BASE64_CHARACTERS: Final = 40

ReportFault = Callable[[Path, str, str], None]
"""Takes the place, the code and the words of what is wrong."""


class ImageValues:
    """Reads images; what is wrong with one is reported, and none is returned."""

    def __init__(self, resolve_image: ResolveImage, report: ReportFault) -> None:
        self._resolve = resolve_image
        self._report = report

    def read(self, value: Any, path: Path) -> bytes | None:
        """Return the bytes of a value: bytes, a data URL, base64, a path, or an object with one."""
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return self._named(value, path)
        if isinstance(value, dict):
            return self._struct(value, path)
        detail = f"The image is {kind_name(value)}; write a data URL or a relative path."
        self._report(path, "type_invalid", detail)
        return None

    def read_base64(self, text: Any, path: Path) -> bytes | None:
        """Return the bytes of a base64 text, with or without the head of a data URL."""
        if isinstance(text, bytes):
            return text
        if not isinstance(text, str):
            detail = f"The image is {kind_name(text)}; write its bytes in base64."
            self._report(path, "type_invalid", detail)
            return None
        url = text if is_data_url(text) else f"data:image/png;base64,{text}"
        try:
            return decode_data_url(url)
        except ValueError as error:
            self._report(path, "image_corrupt", str(error))
            return None

    def read_part(self, part: dict[str, Any], path: Path) -> bytes | None:
        """Return the bytes of an object whose keys (of `SOURCES`) name one image."""
        given = [name for name in SOURCES if not is_empty(part.get(name))]
        if "bytes" in given:  # Hugging Face: the path beside the bytes only says where they were
            given = [name for name in given if name != "path"]
        if len(given) != 1:
            what = f"has {', '.join(given)}" if given else f"has none of {', '.join(SOURCES)}"
            self._report(path, "type_invalid", f"The image {what}; write exactly one of them.")
            return None
        name = given[0]
        if name in {"base64", "data", "bytes"}:
            return self.read_base64(part[name], (*path, name))
        return self.read(part[name], (*path, name))

    def _struct(self, value: dict[Any, Any], path: Path) -> bytes | None:
        named = {str(key): item for key, item in value.items() if not is_empty(item)}
        if named.get("type") in {"base64", "url"}:  # Anthropic: {"type", "media_type", "data"}
            del named["type"]
        for key in sorted(named.keys() - {*SOURCES, *FACTS}):
            self._report((*path, key), "field_unknown", "An image has no such field; drop it.")
            return None
        return self.read_part(named, path)

    def _named(self, text: str, path: Path) -> bytes | None:
        """Return the bytes behind a data URL, base64 or a relative path."""
        if is_data_url(text) or is_base64_image(text):
            return self.read_base64(text, path)
        if "://" in text or text.startswith("//"):
            detail = "Images are never fetched; send a data URL, or a file of the same archive."
            self._report(path, "image_url_not_allowed", detail)
            return None
        name = normalize_path(text)
        if not is_safe_path(name):
            detail = (
                f"{text[:80]!r} is no relative path of at most 255 bytes without `..`; name the"
                " image as it lies beside the rows, such as images/1.png."
            )
            self._report(path, "image_path_invalid", detail)
            return None
        try:
            return self._resolve(name)
        except LookupError as error:
            hint = getattr(error, "hint", "")
            detail = f"The image {text[:200]!r} is not among the files of the dataset. {hint}"
            self._report(path, "image_missing", detail.rstrip())
            return None


def is_base64_image(text: str) -> bool:
    """Tell whether a text is the base64 of a PNG, JPEG or WebP, without a data URL's head."""
    if len(text) < _MIN_BASE64_CHARACTERS or not text.startswith(_BASE64):
        return False
    # One class without alternatives: the time grows with the text and no faster.
    return re.fullmatch(r"[A-Za-z0-9+/=\s]*", text) is not None
