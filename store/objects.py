"""Bytes under keys, in a local folder or in S3, with the same promises.

A folder of objects exists once its manifest does: the parts are written first, the manifest last
and only if there is none, and every reader checks sizes and SHA-256 against it.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import LocalStore, S3Store

from store.errors import (
    ObjectCorrupt,
    ObjectExists,
    ObjectMissing,
    StorageFull,
    StorageUnavailable,
)
from store.folders import make_folder
from store.manifests import MANIFEST_NAME, FileEntry, Manifest, file_sha256
from store.object_errors import describe, is_missing_bucket
from store.settings import Settings

if TYPE_CHECKING:
    from obstore.store import S3Config

CHUNK_BYTES: Final = 8 * 1024**2
_PARALLEL_PARTS: Final = 3
_KEY: Final = re.compile(r"[A-Za-z0-9._=+@-]+(/[A-Za-z0-9._=+@-]+)*")
_TORN: Final = re.compile(r"#\d+$")
"""What a name ends with while its file is being written; never one of ours (`_KEY`)."""
_FULL: Final = ("no space left", "disk quota", "file too large", "disk full")


@dataclass(frozen=True)
class StoredObject:
    """What a listing says of an object."""

    key: str
    size_bytes: int
    modified_at: datetime


class Objects:
    """The object store of a deployment. Safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        """Open the store; a local folder is made if need be.

        Raises:
            ValueError: If it cannot be made.
        """
        url = urlsplit(settings.objects_url)
        self._folder: Path | None = None
        self._store: LocalStore | S3Store
        if url.scheme == "file":
            self._folder = Path(unquote(url.path))
            setting = "GRIT_OBJECTS_URL or GRIT_HOME"
            make_folder(self._folder, what="the folder of objects", setting=setting)
            self._store = LocalStore(self._folder)
        else:
            self._store = _s3_store(settings, bucket=url.netloc, prefix=url.path.strip("/"))

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store bytes under a key, over what was there.

        Raises:
            StorageUnavailable: If the store does not answer.
            StorageFull: If it has no space left.
        """
        with _spoken(key):
            obstore.put(self._store, _checked(key), data, use_multipart=False)
        self._make_durable(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store bytes under a free key; false if it is taken, and nothing changes.

        Raises:
            StorageUnavailable: If the store does not answer.
            StorageFull: If it has no space left.
        """
        with _spoken(key):
            try:
                obstore.put(self._store, _checked(key), data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
        self._make_durable(key)
        return True

    def put_file(self, key: str, path: Path) -> None:
        """Store a file, streamed in parts.

        Raises:
            StorageUnavailable: If the store does not answer.
            StorageFull: If it has no space left.
        """
        with _spoken(key):
            obstore.put(
                self._store,
                _checked(key),
                path,
                chunk_size=CHUNK_BYTES,
                max_concurrency=_PARALLEL_PARTS,
            )
        self._make_durable(key)

    def get_bytes(self, key: str) -> bytes:
        """Return an object's bytes.

        Raises:
            ObjectMissing: If there is none.
        """
        with _spoken(key):
            return bytes(obstore.get(self._store, _checked(key)).bytes())

    def get_range(self, key: str, *, start: int, length: int) -> bytes:
        """Return some bytes of an object; fewer where it ends before.

        Raises:
            ObjectMissing: If there is none.
        """
        length = min(length, self.size_bytes(key) - start)
        if length <= 0:
            return b""
        with _spoken(key):
            return bytes(obstore.get_range(self._store, _checked(key), start=start, length=length))

    def get_to_file(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Copy an object to a file, which appears complete or not at all.

        Raises:
            ObjectMissing: If there is none.
            ObjectCorrupt: If its hash is not the expected one.
            OSError: If the local disk is full or fails.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        chunks = self.open_stream(key)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        digest = hashlib.sha256()
        try:
            # Outside `_spoken`: a full disk here is not the object store's.
            with os.fdopen(handle, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            if sha256 is not None and digest.hexdigest() != sha256:
                raise ObjectCorrupt(key, f"its SHA-256 is {digest.hexdigest()}, not {sha256}")
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)

    def open_stream(self, key: str) -> Iterator[bytes]:
        """Return the object's bytes in chunks.

        Raises:
            ObjectMissing: If there is none (raised here, before the first chunk).
        """
        # In ranges and not one long answer: each is retried by itself, and a stall costs one chunk.
        return self._chunks(key, self.size_bytes(key))

    def size_bytes(self, key: str) -> int:
        """Return an object's size.

        Raises:
            ObjectMissing: If there is none.
        """
        with _spoken(key):
            return obstore.head(self._store, _checked(key))["size"]

    def exists(self, key: str) -> bool:
        """Tell whether something is stored under a key."""
        try:
            self.size_bytes(key)
        except ObjectMissing:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Return the objects below a prefix: whole segments of the key, a final slash or not."""
        below = _checked(prefix.rstrip("/")) if prefix.rstrip("/") else None
        with _spoken(prefix):
            for batch in obstore.list(self._store, prefix=below):
                for found in batch:
                    yield StoredObject(found["path"], found["size"], found["last_modified"])

    def delete(self, key: str) -> None:
        """Delete an object; none there is fine.

        Raises:
            StorageUnavailable: If the store does not answer.
        """
        try:
            with _spoken(key):
                obstore.delete(self._store, _checked(key))
        except ObjectMissing:
            return

    def delete_prefix(self, prefix: str) -> int:
        """Delete every object below a prefix, manifests first, and return how many.

        Raises:
            ValueError: If the prefix is empty.
        """
        if not prefix.strip("/"):
            raise ValueError("delete_prefix needs a prefix; it would empty the whole store")
        keys = [found.key for found in self.list(prefix)]
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{MANIFEST_NAME}")):
            self.delete(key)
        if self._folder is not None:
            _remove_empty_folders(self._folder / prefix.rstrip("/"), below=self._folder)
        return len(keys)

    def delete_torn(self, *, before: datetime) -> int:
        """Delete what interrupted writes left in a local folder, and return how many files.

        On S3 that is the bucket's own rule for incomplete uploads.
        """
        if self._folder is None:
            return 0
        num_torn = 0
        # Not `rglob`, which breaks at a folder that somebody deletes meanwhile.
        for folder, _, names in os.walk(self._folder):
            for path in (Path(folder) / name for name in names if _TORN.search(name)):
                if _modified(path) < before.timestamp():
                    path.unlink(missing_ok=True)
                    num_torn += 1
        return num_torn

    def put_folder(self, prefix: str, folder: Path) -> Manifest:
        """Store a folder's files, then its manifest, which makes it exist.

        Putting the same files again is fine and changes nothing.

        Raises:
            ObjectExists: If the prefix already holds a manifest of other files.
            ValueError: If the folder is empty or holds a link.
        """
        prefix = prefix.rstrip("/")
        manifest = Manifest.of_folder(folder)
        for entry in manifest.files:
            self.put_file(f"{prefix}/{entry.path}", folder / entry.path)
        key = f"{prefix}/{MANIFEST_NAME}"
        # A retried request may find its own first try, so what is there decides.
        if not self.put_if_absent(key, manifest.to_bytes()) and (
            self.read_manifest(prefix) != manifest
        ):
            raise ObjectExists(key)
        return manifest

    def read_manifest(self, prefix: str) -> Manifest:
        """Return a stored folder's manifest.

        Raises:
            ObjectMissing: If the folder was never completed.
            ObjectCorrupt: If it is not a manifest.
        """
        key = f"{prefix.rstrip('/')}/{MANIFEST_NAME}"
        try:
            return Manifest.from_bytes(self.get_bytes(key))
        except ValueError as error:
            raise ObjectCorrupt(key, str(error)) from error

    def get_folder(self, prefix: str, folder: Path) -> Manifest:
        """Copy a stored folder, checking every file's size and SHA-256.

        The folder appears complete or not at all; it must not exist, or be empty.

        Raises:
            ObjectMissing: If the folder or one of its files is not there.
            ObjectCorrupt: If a file differs from the manifest.
            ValueError: If there are files in the folder.
        """
        prefix = prefix.rstrip("/")
        manifest = self.read_manifest(prefix)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; copy a stored folder to a new one")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for entry in manifest.files:
                self._get_entry(f"{prefix}/{entry.path}", partial / entry.path, entry)
            partial.chmod(0o755)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return manifest

    def ping(self) -> None:
        """Ask the store for something, for readiness.

        Raises:
            StorageUnavailable: If it does not answer, or has no such bucket.
        """
        # Not a look at one object: without a bucket, that is missing too.
        next(self.list("ping"), None)

    def _get_entry(self, key: str, path: Path, entry: FileEntry) -> None:
        size_bytes = self.size_bytes(key)
        if size_bytes != entry.size_bytes:
            raise ObjectCorrupt(key, f"it has {size_bytes} bytes, not {entry.size_bytes}")
        self.get_to_file(key, path, sha256=entry.sha256)

    def _chunks(self, key: str, size_bytes: int) -> Iterator[bytes]:
        for start in range(0, size_bytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size_bytes - start)
            with _spoken(key):
                chunk = bytes(
                    obstore.get_range(self._store, _checked(key), start=start, length=length)
                )
            if len(chunk) != length:
                raise ObjectCorrupt(key, f"it ended after {start + len(chunk)} bytes")
            yield chunk

    def _make_durable(self, key: str) -> None:
        """Bring a local file and its name to the disk; S3 answers only once it has done so."""
        if self._folder is None:
            return
        path = self._folder / key
        for target in (path, path.parent):
            handle = os.open(target, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _s3_store(settings: Settings, *, bucket: str, prefix: str) -> S3Store:
    endpoint = settings.s3_endpoint
    secret = settings.s3_secret_access_key
    # Left out, the cloud's own chain of credentials is asked.
    config: S3Config = {"region": settings.s3_region}
    if endpoint is not None:
        config["endpoint"] = endpoint
    if settings.s3_access_key_id is not None and secret is not None:
        config["access_key_id"] = settings.s3_access_key_id
        config["secret_access_key"] = secret.get_secret_value()
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=config,
        client_options={
            "allow_http": endpoint is not None and endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=settings.objects_silence_seconds),
            # A part has 8 MiB: four times the silence is a slow line, and not a dead one.
            "timeout": timedelta(seconds=4 * settings.objects_silence_seconds),
        },
        retry_config={
            "max_retries": 8,
            "retry_timeout": timedelta(seconds=settings.objects_retry_seconds),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=15),
                "base": 2,
            },
        },
    )


def _checked(key: str) -> str:
    """Return the key if it can name neither another folder nor two things on two stores.

    Raises:
        ValueError: If it cannot be a key.
    """
    if _KEY.fullmatch(key) is None or not {".", ".."}.isdisjoint(key.split("/")):
        raise ValueError(f"{key!r} cannot be the key of an object")
    return key


@contextmanager
def _spoken(key: str) -> Iterator[None]:
    """Say in our own words what went wrong with an object.

    Raises:
        ObjectMissing: If it is not there.
        StorageFull: If there is no space for it.
        StorageUnavailable: If the store does not answer, or refuses our credentials.
    """
    try:
        yield
    except (BaseError, OSError) as error:
        missing = isinstance(error, NotFoundError | FileNotFoundError)
        if missing and not is_missing_bucket(error):
            raise ObjectMissing(key) from error
        words = describe(error)
        if any(mark in str(error).lower() for mark in _FULL):
            raise StorageFull(f"The object store has no space left for {key!r}: {words}") from error
        raise StorageUnavailable(f"The object store failed on {key!r}: {words}") from error


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # it was completed, or given up, meanwhile
        return float("inf")


def _remove_empty_folders(folder: Path, *, below: Path) -> None:
    if not folder.is_dir() or not folder.resolve().is_relative_to(below.resolve()):
        return
    for root, _, _ in os.walk(folder, topdown=False):
        try:
            Path(root).rmdir()
        except OSError:  # not empty: somebody has just written to it
            return


__all__ = [
    "MANIFEST_NAME",
    "FileEntry",
    "Manifest",
    "Objects",
    "StoredObject",
    "file_sha256",
]
