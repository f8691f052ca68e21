"""Encoded images as bytes and as `data:` URLs, told apart by their first bytes alone."""

import base64
import binascii
from typing import Final

MAX_IMAGE_BYTES: Final = 20 * 1024**2
_MEDIA_TYPES: Final = ("image/jpeg", "image/png", "image/webp")


def media_type(image: bytes) -> str | None:
    """Return `image/png`, `image/jpeg` or `image/webp` by the first bytes, else nothing."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if image.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "image/webp"
    return None


def data_url(image: bytes) -> str:
    """Write encoded image bytes as a `data:` URL."""
    return f"data:{media_type(image)};base64,{base64.b64encode(image).decode('ascii')}"


def decode_data_url(url: str) -> bytes:
    """Return the image bytes of a `data:` URL.

    Raises:
        ValueError: If the URL is not a base64 one of an image format that we read.
    """
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("A data URL must read data:image/png;base64,...")
    named = head.removeprefix("data:").removesuffix(";base64").lower()
    if named not in _MEDIA_TYPES:
        raise ValueError(f"The data URL is {named[:40]!r}; send one of {', '.join(_MEDIA_TYPES)}.")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("The base64 of the data URL is broken.") from None
