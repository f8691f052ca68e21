"""Encoded images as bytes and as `data:` URLs; the first bytes say what an image is."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote

MAX_IMAGE_BYTES: Final = 20 * 1024**2
MAX_HEAD: Final = 1024
"""Characters up to the comma of a `data:` URL: its media type and parameters."""
_MARK: Final = re.compile(r";\s*base64\s*,", re.IGNORECASE)
_LONE_SPACE: Final = re.compile(r"\S \S")
_URL_SAFE: Final = str.maketrans("-_", "+/")
_OTHER_FORMATS: Final = (
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM.{4}\0{4}", re.DOTALL), "BMP"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "TIFF"),
    (re.compile(rb".{4}ftyp(?:avif|avis)", re.DOTALL), "AVIF"),
    (re.compile(rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL), "HEIC"),
    (re.compile(rb"\0\0\0\x0cJXL |\xff\x0a", re.DOTALL), "JPEG XL"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"\0\0[\x01\x02]\0"), "ICO"),
    (re.compile(rb"8BPS"), "PSD"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:svg|\?xml|!DOCTYPE svg)", re.IGNORECASE), "SVG"),
)
"""Formats that people have and that are not read, by their first bytes."""


def media_type(image: bytes) -> str | None:
    """Return `image/png`, `image/jpeg` or `image/webp` by the first bytes, else nothing."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if image.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "image/webp"
    return None


def describe_format(image: bytes) -> str:
    """Return a sentence for bytes that are no PNG, JPEG or WebP: what they are, and what to do."""
    name = next((name for start, name in _OTHER_FORMATS if start.match(image)), None)
    if name is None:
        return "The image is not a PNG, JPEG or WebP by its first bytes."
    article = "an" if name in {"AVIF", "ICO", "SVG"} else "a"
    return (
        f"The image is {article} {name} file by its first bytes; convert it to PNG, JPEG or WebP."
    )


def is_data_url(text: str) -> bool:
    """Tell whether a text is a `data:` URL; schemes have no case (RFC 3986)."""
    return text[:32].lstrip()[:5].lower() == "data:"


def data_url(image: bytes) -> str:
    """Write encoded image bytes as a `data:` URL."""
    return f"data:{media_type(image)};base64,{base64.b64encode(image).decode('ascii')}"


def decode_data_url(url: str) -> bytes:
    """Return the bytes of a base64 `data:` URL.

    Tools write these in many ways: the scheme and `;base64` in any case, a media type that is
    generic, wrong or absent, parameters, percent-encoding, line breaks, the URL-safe alphabet, no
    padding. All are read. The media type decides nothing: the first bytes do (`media_type`).

    Raises:
        ValueError: If the URL is not a base64 one, or its base64 is broken. Decoding it without its
            spaces would give another picture where they stand for `+`.
    """
    mark = _MARK.search(url, 0, MAX_HEAD) if is_data_url(url) else None
    if mark is None:
        raise ValueError("A data URL must read data:image/png;base64,...")
    body = url[mark.end() :]
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:
        pass  # not in the canonical spelling, which is tried first because it is the fast one
    pieces = (unquote(body) if "%" in body else body).split()
    if _LONE_SPACE.search(body) and not _are_lines(pieces):
        raise ValueError(
            "The base64 of the data URL has spaces within its lines: a form has read each `+` as a"
            " space. Write `+` as %2B there."
        )
    body = "".join(pieces).translate(_URL_SAFE)
    body = body.rstrip("=")
    body += "=" * (-len(body) % 4)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("The base64 of the data URL is broken.") from None


def _are_lines(pieces: Sequence[str]) -> bool:
    """Tell whether pieces of base64 are lines of one length, the last perhaps shorter."""
    *lines, last = map(len, pieces)
    whole = sum(map(len, pieces)) % 4 == 0
    return whole and len(set(lines)) <= 1 and last <= max(lines, default=last)
