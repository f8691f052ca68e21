"""Judge an image before anything trains on it: its format, its size by its header, its pixels."""

import hashlib
import io
from typing import Final

from grit_core.images import describe_format, media_type

MAX_PIXELS: Final = 25_000_000
MAX_SIDE: Final = 8192
MAX_ASPECT: Final = 200

Fault = tuple[str, str]
"""A code and its words."""


class ImageJudge:
    """Remembers what it has seen, since datasets show one image in many rows."""

    def __init__(self) -> None:
        self._seen: dict[bytes, Fault | None] = {}

    def fault(self, data: bytes) -> Fault | None:
        """Return the code and the words of what is wrong with an image, if anything is."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._seen:
            self._seen[digest] = fault_of(data)
        return self._seen[digest]


def fault_of(data: bytes) -> Fault | None:
    """Return the code and the words of what is wrong with an image, if anything is.

    The pixels are read by the decoder that training and inference use: what passes here, they read.
    """
    # Pillow is loaded with the first upload and not with the service.
    from grit_core.data.image_decoding import decode_image  # noqa: PLC0415 - see above

    found = measure(data)[1]
    if found is None:
        try:
            decode_image(data, index=0)
        except Exception as error:  # noqa: BLE001 - decoders raise whatever broken bytes make them raise
            kind = type(error.__cause__ or error).__name__
            return "image_corrupt", f"The image cannot be decoded ({kind})."
    return found


def measure(data: bytes) -> tuple[int, Fault | None]:
    """Read an image's header alone: count its pixels, or say what is wrong with it.

    The bounds are the same for an image that is stored sideways, so that the header's size serves.
    """
    if media_type(data) is None:
        return 0, ("image_format_not_allowed", describe_format(data))
    size = _webp_size(data)  # Pillow would take memory for such an image's canvas to open it
    if size is not None and (found := _size_fault(*size, frames=1)) is not None:
        return 0, found
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 - as in `fault_of`

    from grit_core.data.image_decoding import FORMATS  # noqa: PLC0415 - as in `fault_of`

    # Warnings keep their filters: to change those for a while is not safe among threads.
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            # The further pictures of a JPEG are previews and depth maps, and are not shown.
            moving = media_type(data) != "image/jpeg"
            frames = getattr(image, "n_frames", 1) if moving else 1
            return width * height, _size_fault(width, height, frames=frames)
    except UnidentifiedImageError:
        found = "image_format_not_allowed", "The image is not a readable PNG, JPEG or WebP."
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        found = "image_too_large", f"The image has more than {MAX_PIXELS} pixels."
    except Exception as error:  # noqa: BLE001 - decoders raise whatever broken bytes make them raise
        found = "image_corrupt", f"The image cannot be decoded ({type(error).__name__})."
    return 0, found


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP by its first chunk (RFC 9649); none for other formats."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind, bits = data[12:16], int.from_bytes(data[21:25], "little")
    if kind == b"VP8X":
        sides = data[24:27], data[27:30]
        return 1 + int.from_bytes(sides[0], "little"), 1 + int.from_bytes(sides[1], "little")
    if kind == b"VP8L":
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        sides = data[26:28], data[28:30]
        width, height = (int.from_bytes(side, "little") & 0x3FFF for side in sides)
        return width, height
    return None


def _size_fault(width: int, height: int, *, frames: int) -> Fault | None:
    if width < 1 or height < 1:
        return "image_too_large", f"The image is {width} x {height} pixels: there is nothing in it."
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        detail = f"The image is {width} x {height}; at most {MAX_PIXELS} pixels, {MAX_SIDE} a side."
        return "image_too_large", detail
    if max(width, height) > MAX_ASPECT * min(width, height):
        return "image_too_large", f"The image is {width} x {height}: thinner than {MAX_ASPECT}:1."
    if frames > 1:
        return "image_too_large", f"The image has {frames} frames; send one frame."
    return None
