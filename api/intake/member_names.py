"""Names of an archive's files as every system means them, and the files that systems add."""

import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Final

from grit_core.records import normalize_path

_ADDED_FOLDERS: Final = frozenset({
    *("__macosx", ".spotlight-v100", ".trashes", ".fseventsd", ".temporaryitems", "@eadir"),
    *("$recycle.bin", ".ipynb_checkpoints"),
})
_ADDED_FILES: Final = frozenset({
    *(".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".localized", ".directory"),
    "icon\r",
})
_APPLE_DOUBLE: Final = "._"
_IS_UTF8: Final = 0x800
_UNICODE_PATH: Final = 0x7075


def is_added_by_system(name: str) -> bool:
    """Tell whether a file was added by a system that packed the others (`._a.png`, `Thumbs.db`)."""
    *folders, file = PurePosixPath(normalize_path(name)).parts or ("",)
    return (
        file.startswith(_APPLE_DOUBLE)
        or file.casefold() in _ADDED_FILES
        or any(folder.casefold() in _ADDED_FOLDERS for folder in folders)
    )


def zip_member_name(info: zipfile.ZipInfo) -> str:
    """Return the name of a zip's member, also where its writer did not say that it is UTF-8.

    macOS and Info-ZIP write UTF-8 without the flag for it; `zipfile` reads such names as code page
    437. Bytes that are UTF-8 beyond ASCII are hardly ever meant as anything else.
    """
    if info.flag_bits & _IS_UTF8 or info.filename.isascii():
        return info.filename
    try:
        raw = info.filename.encode("cp437")
    except UnicodeEncodeError:
        return info.filename
    named = _unicode_path(info.extra, raw)
    if named is not None:
        return named
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return info.filename


def _unicode_path(extra: bytes, raw: bytes) -> str | None:
    """Return the name of Info-ZIP's extra field, if it is there and belongs to the raw name."""
    for kind, data in _extra_fields(extra):
        if kind == _UNICODE_PATH and len(data) > 5 and data[0] == 1:
            (checksum,) = struct.unpack_from("<I", data, 1)
            if checksum == zlib.crc32(raw):
                try:
                    return data[5:].decode("utf-8")
                except UnicodeDecodeError:
                    return None
    return None


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if at + 4 + size <= len(extra):  # else it is cut
            yield kind, extra[at + 4 : at + 4 + size]
        at += 4 + size


class MemberIndex:
    """Finds an archive's file by the path that a row names."""

    def __init__(self, names: Collection[str], *, rows_name: str) -> None:
        """Index the names.

        Args:
            names: Of the archive's files.
            rows_name: Of its JSONL file: paths start at its folder, or at one around it.
        """
        self._names = frozenset(names)
        self._folders = tuple(PurePosixPath(rows_name).parents)
        self._near: dict[str, str] | None = None

    def find(self, path: str) -> str | None:
        """Return the file that a row's path names: beside the rows first, then further out."""
        for folder in self._folders:
            name = normalize_path(str(folder / PurePosixPath(path)))
            if name in self._names:
                return name
        return None

    def hint(self, path: str) -> str:
        """Name the file that was probably meant, for a path that names none."""
        if self._near is None:
            self._near = {}
            for name in sorted(self._names, reverse=True):
                for key in _likenesses(name):
                    self._near[key] = name
        near = next((self._near[key] for key in _likenesses(path) if key in self._near), None)
        if near is None:
            return f"The archive has {len(self._names)} files, and none of a name like it."
        shown = near.encode("ascii", "backslashreplace").decode()
        if PurePosixPath(near).name == PurePosixPath(path).name:
            folder = str(self._folders[0])
            start = "archive's root" if folder == "." else f"folder {folder}"
            return f"There is {shown!r}: write its path from the {start}."
        return f"There is {shown!r}: write the name as it is, in the same case."


def _likenesses(name: str) -> tuple[str, ...]:
    """Return what two names that are meant alike have in common, the most telling first."""
    path = PurePosixPath(name.casefold())
    return path.as_posix(), f"*/{path.name}", f"*/{path.stem}.*"
