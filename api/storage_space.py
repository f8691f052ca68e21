"""Whether there is room to write: looked up for folders of this machine, noted for the rest."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import structlog
from sqlalchemy import make_url

from store.settings import Settings

REMEMBERED_SECONDS: Final = 300.0
"""So long after a write that found no space, readiness speaks of it."""
_LEAST_INODES: Final = 100
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What there is to write on."""

    words: str
    """`ok`, or what is short of space; no path, since anyone may read it."""
    is_full: bool
    """The rows or the objects have no room, so that this process cannot do its work."""


class StorageSpace:
    """The room of a deployment's database, objects and temporary files."""

    def __init__(self, settings: Settings) -> None:
        self._least_bytes = settings.min_free_bytes
        self._folders = _local_folders(settings)
        self._refused_at: float | None = None

    def note_full(self) -> None:
        """Remember that a write found no space just now."""
        self._refused_at = time.monotonic()

    def look(self) -> Space:
        """Return how things are; it costs a system call a folder, and nothing is written."""
        short = {
            name: words for name, folder in self._folders.items() if (words := self._short(folder))
        }
        short["temporary files"] = self._short(Path(tempfile.gettempdir()))
        found = [f"{name}: {words}" for name, words in short.items() if words]
        if found:
            _log.warning("storage_short", folders=found)
            is_full = any(short.get(name) for name in self._folders)
            return Space(words=f"full ({'; '.join(found)})", is_full=is_full)
        since = None if self._refused_at is None else time.monotonic() - self._refused_at
        if since is not None and since < REMEMBERED_SECONDS:
            # Perhaps one upload was too large for what is left: others may still be served.
            words = f"a write found no space left {since:.0f} s ago"
            return Space(words=words, is_full=False)
        return Space(words="ok", is_full=False)

    def _short(self, folder: Path) -> str:
        """Return what a folder's file system lacks, if anything."""
        try:
            found = os.statvfs(folder)
        except OSError as error:
            return f"cannot be looked at: {error.strerror}"
        free_bytes = found.f_bavail * found.f_frsize
        if free_bytes < self._least_bytes:
            return f"{free_bytes:,} bytes are free and GRIT_MIN_FREE_BYTES is {self._least_bytes:,}"
        if found.f_files and found.f_favail < _LEAST_INODES:
            return f"{found.f_favail} files more can be made"
        return ""


def _local_folders(settings: Settings) -> dict[str, Path]:
    """Return the folders of rows and objects that are on disks of this machine."""
    folders: dict[str, Path] = {}
    file = make_url(settings.database_url).database if settings.is_sqlite else None
    if file:
        folders["database"] = Path(file).absolute().parent
    objects = urlsplit(settings.objects_url)
    if objects.scheme == "file":
        folders["objects"] = Path(unquote(objects.path))
    return folders
