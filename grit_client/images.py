"""Images on their way to the service: paths and bytes become `data:` URLs."""

from pathlib import Path

from grit_client.errors import InvalidInput
from grit_core import images


def data_url(image: str | Path | bytes) -> str:
    """Return an image as a `data:` URL; one that already is a `data:` URL stays as it is.

    Args:
        image: A file's path, its bytes, or a `data:` URL. The bytes decide the kind, not the name.

    Raises:
        InvalidInput: If the file is not there, or is no PNG, JPEG or WebP.
    """
    if isinstance(image, str) and images.is_data_url(image):
        return image
    if isinstance(image, bytes):
        content, name = image, "the image"
    else:
        name = str(image)
        try:
            content = Path(image).expanduser().read_bytes()
        except OSError as error:
            raise InvalidInput(f"The image {name!r} cannot be read: {error.strerror}.") from None
    if images.media_type(content) is None:
        raise InvalidInput(f"{name} cannot be sent. {images.describe_format(content)}")
    return images.data_url(content)
