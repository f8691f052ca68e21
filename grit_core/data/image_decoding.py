"""Encoded images as RGB pixels: the one decoder of training, evaluation and inference."""

import io

from PIL import Image, UnidentifiedImageError

from grit_core.errors import InvalidDataset


def decode_image(data: bytes, *, index: int) -> Image.Image:
    """Decode one image to RGB; `index` names it in the error.

    Raises:
        InvalidDataset: The bytes are no image, or are cut off.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InvalidDataset(f"image {index} cannot be decoded: {reason}") from error
