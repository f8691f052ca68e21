"""Images on their way to the service: paths, addresses and bytes become `data:` URLs."""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from grit_client.errors import InvalidInput
from grit_core import images

if TYPE_CHECKING:
    import httpx


def data_url(image: str | Path | bytes, *, transport: "httpx.BaseTransport | None" = None) -> str:
    """Return an image as a `data:` URL; one that already is a `data:` URL stays as it is.

    Args:
        image: A file's path (`~` is the home folder), an `http://`, `https://` or `file://`
            address, the bytes, or a `data:` URL. The bytes decide the format, not the name.
        transport: Another httpx transport for downloads, for tests and for proxies.

    Raises:
        InvalidInput: If it cannot be read, is too large, or is no PNG, JPEG or WebP.
    """
    if isinstance(image, str) and images.is_data_url(image):
        return image
    if not image:
        raise InvalidInput("The image is empty; give a file, an address or the bytes of one.")
    if isinstance(image, bytes):
        content, name = image, "the image"
    else:
        name = str(image)
        content = _load(image, transport)
    if len(content) > images.MAX_IMAGE_BYTES:
        raise InvalidInput(_too_large(name, len(content)))
    if images.media_type(content) is None:
        raise InvalidInput(f"{name} cannot be sent. {images.describe_format(content)}")
    return images.data_url(content)


def _load(image: str | Path, transport: "httpx.BaseTransport | None") -> bytes:
    scheme = urlsplit(image).scheme.lower() if isinstance(image, str) else ""
    if isinstance(image, str) and scheme in {"http", "https"}:
        from grit_client.image_download import download  # noqa: PLC0415 - for --help's sake

        return download(image, max_bytes=images.MAX_IMAGE_BYTES, transport=transport)
    if isinstance(image, str) and "://" in image and scheme != "file":
        raise InvalidInput(
            f"The image {image!r} has an address of the kind {scheme}://; give a file, or an"
            " address that begins with http:// or https://."
        )
    path = Path(unquote(urlsplit(str(image)).path)) if scheme == "file" else Path(image)
    try:
        path = path.expanduser()
        if path.stat().st_size > images.MAX_IMAGE_BYTES:
            raise InvalidInput(_too_large(str(image), path.stat().st_size))
        return path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInput(f"The image {str(image)!r} cannot be read: {reason}.") from None


def _too_large(name: str, size_bytes: int) -> str:
    return (
        f"The image {name!r} has {size_bytes:,} bytes; at most {images.MAX_IMAGE_BYTES:,} are"
        " accepted. Make it smaller."
    )
