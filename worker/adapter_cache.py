"""Adapter folders on this machine's disk, whose files are those that were stored."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import structlog

from store.manifests import file_sha256

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from store.manifests import Manifest
    from store.objects import Objects

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class HeldAdapter:
    """An adapter's files, which stay for as long as they are held."""

    id: str
    """Names the adapter and its content: other files would have another id."""
    folder: Path


@dataclass
class _Entry:
    """An adapter that somebody holds, or fetches."""

    holders: int = 0
    checking: threading.Lock = field(default_factory=threading.Lock)


class AdapterCache:
    """The adapters asked for last. Safe to share between threads; a folder of this process's own.

    Every file is verified by its SHA-256 when it comes. Beside the folder stands a record of what
    each file looked like then; a file that looks different later is hashed again, and one that is
    different makes the whole folder come anew.
    """

    def __init__(self, home: Path, objects: Objects, *, max_adapters: int) -> None:
        """Take a folder below `home/cache/adapters` that no living process has.

        Args:
            home: The worker's home folder.
            objects: Where adapters come from.
            max_adapters: How many are kept when nobody holds them.
        """
        self.folder, self._lock_fd = _own_folder(home / "cache" / "adapters")
        self._objects = objects
        self._max_adapters = max_adapters
        self._guard = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._trash = count()
        for left in self.folder.glob(".*"):  # of a process that was killed
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def hold(self, adapter_id: str, *, prefix: str) -> Iterator[HeldAdapter]:
        """Keep an adapter's folder here while it is used; it is downloaded when need be.

        Args:
            adapter_id: Its row's id.
            prefix: Where its files are stored.
        """
        with self._guard:
            entry = self._entries.setdefault(adapter_id, _Entry())
            entry.holders += 1
        try:
            with entry.checking:
                held = self._ready(adapter_id, prefix)
            yield held
        finally:
            with self._guard:
                entry.holders -= 1
                if entry.holders == 0:
                    del self._entries[adapter_id]

    def close(self) -> None:
        """Leave the folder to another process."""
        os.close(self._lock_fd)

    def _ready(self, adapter_id: str, prefix: str) -> HeldAdapter:
        folder = self.folder / adapter_id
        content = _verified(folder)
        if content is None:
            content = self._download(folder, prefix)
            self._prune()
        os.utime(folder)
        return HeldAdapter(f"{adapter_id}-{content[:12]}", folder)

    def _download(self, folder: Path, prefix: str) -> str:
        # It appears complete and with every SHA-256 checked, or not at all.
        fresh = folder.with_name(f".{folder.name}.{next(self._trash)}")
        manifest = self._objects.get_folder(prefix, fresh)
        self._remove(folder)
        _write_record(folder, fresh, manifest)
        fresh.rename(folder)
        return manifest.sha256

    def _prune(self) -> None:
        with self._guard:
            folders = [one for one in self.folder.glob("adp_*") if one.is_dir()]
            folders.sort(key=lambda one: one.stat().st_mtime)
            too_many = max(0, len(folders) - self._max_adapters)
            free = [one for one in folders if one.name not in self._entries]
            gone = [self._set_aside(folder) for folder in free[:too_many]]
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove(self, folder: Path) -> None:
        if folder.is_dir():
            shutil.rmtree(self._set_aside(folder), ignore_errors=True)

    def _set_aside(self, folder: Path) -> Path:
        _record_of(folder).unlink(missing_ok=True)
        return folder.rename(folder.with_name(f".{folder.name}.{next(self._trash)}"))


def _own_folder(base: Path) -> tuple[Path, int]:
    """Return the first numbered folder that no living process has, and the lock on it."""
    numbers = count()
    while True:
        folder = base / str(next(numbers))
        folder.mkdir(parents=True, exist_ok=True)
        lock_fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
        else:
            return folder, lock_fd


def _record_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _write_record(folder: Path, fresh: Path, manifest: Manifest) -> None:
    files = {
        entry.path: {"sha256": entry.sha256, "looks": _looks(fresh / entry.path)}
        for entry in manifest.files
    }
    record = {"sha256": manifest.sha256, "files": files}
    _record_of(folder).write_text(json.dumps(record), encoding="utf-8")


def _verified(folder: Path) -> str | None:
    """Return the hash of a folder's manifest; none if it is not here, or not what it was."""
    try:
        record: dict[str, Any] = json.loads(_record_of(folder).read_text(encoding="utf-8"))
        if not _is_as_recorded(folder, record["files"]):
            _log.warning("cached_adapter_damaged", adapter=folder.name)
            return None
        return str(record["sha256"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        _log.warning("cached_adapter_unknown", adapter=folder.name)
        return None


def _is_as_recorded(folder: Path, files: dict[str, Any]) -> bool:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return found == files.keys() and all(
        _looks(folder / path) == known["looks"] or file_sha256(folder / path) == known["sha256"]
        for path, known in files.items()
    )


def _looks(path: Path) -> list[int]:
    """What tells a changed file: its size in bytes, the time of its last change, its inode."""
    found = path.lstat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]
