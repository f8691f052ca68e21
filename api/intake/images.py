"""Judge an image before anything trains on it: its format, its size by its header, its pixels."""

import hashlib
import io
import warnings
from typing import Final

MAX_PIXELS: Final = 25_000_000
MAX_SIDE: Final = 8192
MAX_ASPECT: Final = 200
_FORMATS: Final = ("PNG", "JPEG", "WEBP")


class ImageJudge:
    """Remembers what it has seen, since datasets show one image in many rows."""

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[str, str] | None] = {}

    def fault(self, data: bytes) -> tuple[str, str] | None:
        """Return the code and the words of what is wrong with an image, if anything is."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._seen:
            self._seen[digest] = fault_of(data)
        return self._seen[digest]


def fault_of(data: bytes) -> tuple[str, str] | None:
    """Return the code and the words of what is wrong with an image, if anything is."""
    # Pillow is loaded with the first upload and not with the service.
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 - see above

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                found = _size_fault(*image.size, frames=getattr(image, "n_frames", 1))
                if found is None:
                    image.load()
                return found
        except UnidentifiedImageError:
            return "image_format_not_allowed", "The image is not a readable PNG, JPEG or WebP."
        except Image.DecompressionBombError:
            return "image_too_large", f"The image has more than {MAX_PIXELS} pixels."
        except Exception as error:  # noqa: BLE001 - decoders raise whatever broken bytes make them raise
            return "image_corrupt", f"The image cannot be decoded ({type(error).__name__})."


def _size_fault(width: int, height: int, *, frames: int) -> tuple[str, str] | None:
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


def pixels_of(data: bytes) -> int:
    """Count the pixels of an image that `fault_of` found no fault with, by its header."""
    from PIL import Image  # noqa: PLC0415 - as above

    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        return int(width * height)
