"""A multipart upload that never holds the file in memory and tells how far it is."""

import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grit_client.errors import InvalidInput

CHUNK_BYTES = 256 * 1024

OnProgress = Callable[[int, int], None]
"""Called with the bytes sent so far and the bytes in all."""


def multipart_file(
    path: Path, fields: Mapping[str, str], *, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Return httpx's `content` and `headers` for one file (part `file`) and some form fields.

    The length is announced, so that a service can refuse too large a file before it is sent.

    Raises:
        InvalidInput: If the file cannot be read.
    """
    try:
        size_bytes = path.stat().st_size
        path.open("rb").close()
    except OSError as error:
        raise InvalidInput(f"The file {str(path)!r} cannot be read: {error.strerror}.") from None
    boundary = secrets.token_hex(16)
    head = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    )
    head += (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{_quoted(path)}"'
        "\r\nContent-Type: application/octet-stream\r\n\r\n"
    ).encode()
    tail = f"\r\n--{boundary}--\r\n".encode()

    def parts() -> Iterator[bytes]:
        yield head
        sent = 0
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
                sent += len(chunk)
                if on_progress is not None:
                    on_progress(sent, size_bytes)
        yield tail

    return {
        "content": parts(),
        "headers": {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(head) + size_bytes + len(tail)),
        },
    }


def _quoted(path: Path) -> str:
    # As browsers do it: percent-encode what would end the quoted name.
    name = path.name
    for character in '"\r\n':
        name = name.replace(character, f"%{ord(character):02X}")
    return name
