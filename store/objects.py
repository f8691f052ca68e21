"""Bytes under keys, in a local folder or in S3, with the same promises.

A folder of objects exists once its `manifest.json` does: the parts are written first, the manifest
last and only if there is none, and every reader checks sizes and SHA-256 against it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from store.settings import Settings


@dataclass(frozen=True)
class StoredObject:
    """What a listing says of an object."""

    key: str
    size_bytes: int


@dataclass(frozen=True)
class FileEntry:
    """One file of a stored folder."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a stored folder, by path; `sha256` is the hash of the manifest's own bytes."""

    files: tuple[FileEntry, ...]
    sha256: str

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all files together."""
        return sum(file.size_bytes for file in self.files)


class Objects:
    """The object store of a deployment. Safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        """Open the store; a local folder is made if need be.

        Raises:
            ValueError: If the URL is neither `file://` nor `s3://`.
        """
        raise NotImplementedError

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store bytes under a key, over what was there."""
        raise NotImplementedError

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store bytes under a free key; false if it is taken, and nothing changes."""
        raise NotImplementedError

    def put_file(self, key: str, path: Path) -> None:
        """Store a file, streamed in parts."""
        raise NotImplementedError

    def get_bytes(self, key: str) -> bytes:
        """Return an object's bytes.

        Raises:
            ObjectMissing: If there is none.
        """
        raise NotImplementedError

    def get_range(self, key: str, *, start: int, length: int) -> bytes:
        """Return some bytes of an object.

        Raises:
            ObjectMissing: If there is none.
        """
        raise NotImplementedError

    def get_to_file(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Copy an object to a file, which appears complete or not at all.

        Raises:
            ObjectMissing: If there is none.
            ObjectCorrupt: If its hash is not the expected one.
        """
        raise NotImplementedError

    def open_stream(self, key: str) -> Iterator[bytes]:
        """Return the object's bytes in chunks.

        Raises:
            ObjectMissing: If there is none (raised here, before the first chunk).
        """
        raise NotImplementedError

    def size_bytes(self, key: str) -> int:
        """Return an object's size.

        Raises:
            ObjectMissing: If there is none.
        """
        raise NotImplementedError

    def exists(self, key: str) -> bool:
        """Tell whether something is stored under a key."""
        raise NotImplementedError

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Return the objects whose keys begin with a prefix that ends at a slash."""
        raise NotImplementedError

    def delete(self, key: str) -> None:
        """Delete an object; none there is fine."""
        raise NotImplementedError

    def delete_prefix(self, prefix: str) -> int:
        """Delete every object below a prefix, manifests first, and return how many."""
        raise NotImplementedError

    def put_folder(self, prefix: str, folder: Path) -> Manifest:
        """Store a folder's files, then its manifest, which makes it exist.

        Raises:
            ObjectExists: If the prefix already holds a manifest of other files.
            ValueError: If the folder is empty, or holds a link or a file named `manifest.json` at its
                root that is not ours to write.
        """
        raise NotImplementedError

    def read_manifest(self, prefix: str) -> Manifest:
        """Return a stored folder's manifest.

        Raises:
            ObjectMissing: If the folder was never completed.
            ObjectCorrupt: If it is not a manifest.
        """
        raise NotImplementedError

    def get_folder(self, prefix: str, folder: Path) -> Manifest:
        """Copy a stored folder, checking every file's size and SHA-256.

        Raises:
            ObjectMissing: If the folder or one of its files is not there.
            ObjectCorrupt: If a file differs from the manifest.
        """
        raise NotImplementedError

    def ping(self) -> None:
        """Ask the store for something, for readiness.

        Raises:
            StorageUnavailable: If it does not answer.
        """
        raise NotImplementedError
