"""Images on their way to the service: paths and bytes become `data:` URLs."""

import base64
from pathlib import Path

from grit_client.errors import InvalidInput

_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II*\x00": "image/tiff",
    b"MM\x00*": "image/tiff",
}


def data_url(image: str | Path | bytes) -> str:
    """Return an image as a `data:` URL; one that already is a `data:` URL stays as it is.

    Args:
        image: A file's path, its bytes, or a `data:` URL. The bytes decide the kind, not the name.

    Raises:
        InvalidInput: If the file is not there or is no image.
    """
    if isinstance(image, str) and image.startswith("data:"):
        return image
    if isinstance(image, bytes):
        content, name = image, "the image"
    else:
        name = str(image)
        try:
            content = Path(image).expanduser().read_bytes()
        except OSError as error:
            raise InvalidInput(f"The image {name!r} cannot be read: {error.strerror}.") from None
    kind = _kind_of(content)
    if kind is None:
        raise InvalidInput(f"{name} is not an image: send PNG, JPEG, WebP, GIF, BMP or TIFF.")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _kind_of(content: bytes) -> str | None:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return kind
    return None
