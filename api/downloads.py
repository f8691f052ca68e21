"""A stored folder as one stream of tar, never held whole in memory or on disk."""

import tarfile
from collections.abc import Iterator

from store.objects import FileEntry, Manifest, Objects

_BLOCK_BYTES = tarfile.BLOCKSIZE


def stream_tar(objects: Objects, prefix: str, manifest: Manifest, *, root: str) -> Iterator[bytes]:
    """Yield a tar of a stored folder's files under `root/`, byte for byte the same each time."""
    for entry in manifest.files:
        yield _header(entry, root)
        yield from objects.open_stream(f"{prefix.rstrip('/')}/{entry.path}")
        yield b"\0" * (-entry.size_bytes % _BLOCK_BYTES)
    yield b"\0" * (2 * _BLOCK_BYTES)


def _header(entry: FileEntry, root: str) -> bytes:
    info = tarfile.TarInfo(f"{root}/{entry.path}")
    info.size = entry.size_bytes
    info.mode = 0o644
    return info.tobuf(format=tarfile.PAX_FORMAT)
