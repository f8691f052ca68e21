"""Encoded images as RGB pixels: the one decoder of intake, training, evaluation and inference.

The pixels are those that a viewer shows, whatever the encoding:

- The EXIF orientation is applied.
- Transparency is composited on white, as transformers' image processors do.
- 16-bit samples are scaled to 8 bits; Pillow's own conversion clips them.
- Colour profiles and gamma are ignored, as transformers' image processors ignore them: a model sees
  the sample values that it was pretrained on.

The result carries no metadata, so that nothing downstream can apply it a second time.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from PIL import ExifTags, Image, UnidentifiedImageError

from grit_core.errors import InvalidDataset

FORMATS: Final = ("PNG", "JPEG", "WEBP")
"""Pillow's names. A JPEG of several pictures (MPO, from cameras and phones) shows its first."""
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to show what is stored, by EXIF orientation."""
_SIDEWAYS: Final = frozenset({5, 6, 7, 8})
_MODES: Final = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"})
_LATE_METADATA: Final = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Marks of PNG chunks that may hold an orientation and may stand behind the pixels."""
_STRIP_PIXELS: Final = 1 << 20
_BROKEN: Final = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises for broken bytes."""


def decode_image(data: bytes, *, index: int) -> Image.Image:
    """Decode one image to RGB as a viewer shows it.

    Bytes that are no image that is read, or are cut off, are an `InvalidDataset` that names the
    image by its `index`.
    """
    with _opened(data, index=index) as image:
        image.load()
        shown = _as_rgb(image, data)
        turn = _TURNS.get(_orientation(image, data))
        if turn is not None:
            shown = shown.transpose(turn)
    shown.info.clear()
    return shown


def read_size(data: bytes, *, index: int) -> tuple[int, int]:
    """Return the width and height of what `decode_image` returns, without decoding its pixels.

    Only a PNG whose orientation stands behind its pixels is decoded. Errors are as there.
    """
    with _opened(data, index=index) as image:
        width, height = image.size
        return (height, width) if _orientation(image, data) in _SIDEWAYS else (width, height)


@contextmanager
def _opened(data: bytes, *, index: int) -> Iterator[Image.Image]:
    """Open an image and put what is wrong with it into words.

    Raises:
        InvalidDataset: The bytes are no image that is read, or are cut off.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except _BROKEN as error:
        reason = "not a PNG, JPEG or WebP"
        if not isinstance(error, UnidentifiedImageError):
            reason = str(error)
        raise InvalidDataset(f"image {index} cannot be decoded: {reason}") from error


def _orientation(image: Image.Image, data: bytes) -> int:
    """Return the EXIF orientation, 1 where there is none."""
    # For its orientation Pillow decodes a whole PNG, unless the header has one.
    if image.format == "PNG" and not any(mark in data for mark in _LATE_METADATA):
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - broken metadata raises anything; viewers then show what is stored
        return 1


def _as_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """Return a new RGB image of a loaded one, in the orientation that is stored.

    Raises:
        ValueError: The samples are of a kind that none of the formats has.
    """
    if image.mode not in _MODES:
        raise ValueError(f"its samples are of kind {image.mode}; save it as 8-bit RGB")
    key = image.info.get("transparency")
    if image.mode == "I;16":
        return _grey_as_rgb(image, key)
    if image.format == "PNG" and key is not None and image.mode != "P":
        image.info["transparency"] = _as_8_bit(key, bits=data[24], mode=image.mode)
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _grey_as_rgb(image: Image.Image, key: int | None) -> Image.Image:
    """Scale 16-bit grey to 8 bits; the level `key` is transparent, so white."""
    levels = [(value + 128) // 257 for value in range(1 << 16)]
    if key is not None:
        levels[key] = 255
    return image.convert("I").point(levels, "L").convert("RGB")


def _as_8_bit(
    key: int | tuple[int, int, int], *, bits: int, mode: str
) -> int | tuple[int, int, int]:
    """Return a PNG's transparent colour in the samples that Pillow makes of it.

    Pillow scales grey of 2 and 4 bits to 8 and keeps the high bytes of 16-bit colour, but leaves
    the transparent colour as it stands in the file.
    """
    if isinstance(key, tuple):
        red, green, blue = key
        return (red >> 8, green >> 8, blue >> 8) if bits == 16 else (red, green, blue)
    return key if mode == "1" else (key & ((1 << bits) - 1)) * 255 // ((1 << bits) - 1)


def _on_white(image: Image.Image) -> Image.Image:
    """Composite on white, in strips: a whole second and third RGBA image would take the memory."""
    width, height = image.size
    shown = Image.new("RGB", image.size)
    step = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, step):
        strip = image.crop((0, top, width, min(top + step, height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        shown.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return shown
