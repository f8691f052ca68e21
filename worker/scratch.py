"""The worker's scratch space: a folder for every attempt, and datasets kept between attempts."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from store.manifests import file_sha256

if TYPE_CHECKING:
    from store.objects import Objects

_LOCK_NAME = ".lock"
_log = structlog.get_logger(__name__)


class Scratch:
    """Folders below `<home>/scratch/<worker>`, swept by the next worker if this one is killed."""

    def __init__(self, home: Path, worker_id: str) -> None:
        self.root = home / "scratch"
        self.folder = self.root / worker_id
        self.folder.mkdir(parents=True)
        self._lock_fd = os.open(self.folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)

    def new_folder(self) -> Path:
        """Return a new empty folder."""
        return Path(tempfile.mkdtemp(prefix="attempt-", dir=self.folder))

    def remove(self, folder: Path) -> None:
        """Delete one attempt's folder."""
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Delete everything of this worker."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock_fd)

    def sweep(self) -> list[str]:
        """Delete what dead workers left behind and return their names; the living hold a lock."""
        swept = []
        for folder in self.root.iterdir():
            if folder != self.folder and folder.is_dir() and _abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                swept.append(folder.name)
        if swept:
            _log.info("scratch_swept", workers=swept)
        return swept


class DatasetCache:
    """Datasets by their SHA-256, verified when they come and again when a new worker meets them."""

    def __init__(self, home: Path, *, bound_bytes: int) -> None:
        self.folder = home / "cache" / "datasets"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bound_bytes = bound_bytes
        self._verified: dict[str, tuple[int, int, int]] = {}

    def fetch(self, objects: Objects, *, key: str, sha256: str) -> Path:
        """Return the local file of a dataset, downloading it when it is not here.

        A stored object with another SHA-256 raises `ObjectCorrupt`, and no file appears.
        """
        path = self.folder / f"{sha256}.jsonl"
        if path.exists() and self._is_whole(path, sha256):
            _note_use(path)
            self._verified[sha256] = _identity(path)
            return path
        objects.get_to_file(key, path, sha256=sha256)
        _note_use(path)
        self._verified[sha256] = _identity(path)
        self._prune(keep=path)
        return path

    def _is_whole(self, path: Path, sha256: str) -> bool:
        return self._verified.get(sha256) == _identity(path) or file_sha256(path) == sha256

    def _prune(self, *, keep: Path) -> None:
        files = sorted(self.folder.glob("*.jsonl"), key=lambda file: file.stat().st_mtime)
        total_bytes = sum(file.stat().st_size for file in files)
        for file in files:
            if total_bytes <= self.bound_bytes:
                return
            if file != keep:
                total_bytes -= file.stat().st_size
                file.unlink(missing_ok=True)


def _note_use(path: Path) -> None:
    """Set the time that pruning goes by; the kernel's own stamps come in steps of milliseconds."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def snapshot(folder: Path, into: Path) -> Path:
    """Copy `folder`, by hard links where possible, so that it outlives the original."""
    shutil.copytree(folder, into, copy_function=_link_or_copy)
    return into


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_ino, status.st_mtime_ns


def _abandoned(folder: Path) -> bool:
    try:
        fd = os.open(folder / _LOCK_NAME, os.O_RDWR)
    except OSError:
        return False  # just being made, or just being deleted
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
