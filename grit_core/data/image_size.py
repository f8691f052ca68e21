"""The size of an encoded image as it will be decoded, read from its header."""

import io
from typing import Final

from PIL import ExifTags, Image, UnidentifiedImageError

from grit_core.errors import InvalidDataset

_LYING: Final = frozenset({5, 6, 7, 8})
"""EXIF orientations that exchange width and height."""

_PNG_EXIF: Final = (b"eXIf", b"Raw profile type")
"""Marks of EXIF data in a PNG. Pillow decodes every PNG that it is asked for EXIF data, for they
may stand behind the pixels."""


def image_size(data: bytes, *, index: int) -> tuple[int, int]:
    """Return width and height, orientation applied; `index` names the image in the error.

    Raises:
        InvalidDataset: The bytes are no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            may_lie = image.format != "PNG" or any(mark in data for mark in _PNG_EXIF)
            if may_lie and image.getexif().get(ExifTags.Base.Orientation) in _LYING:
                return height, width
            return width, height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InvalidDataset(f"image {index} cannot be decoded: {reason}") from error
