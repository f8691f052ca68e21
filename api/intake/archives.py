"""Zip and tar files that strangers made: listed and judged first, never unpacked by their names."""

import bz2
import gzip
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, cast

from api.intake.member_names import is_added_by_system, zip_member_name
from api.intake.refusal import Refused
from grit_core.records import is_safe_path, normalize_path

MAX_MEMBERS: Final = 200_000
MAX_TOTAL_BYTES: Final = 50 * 1024**3
MAX_RATIO: Final = 200
_RATIO_FROM_BYTES: Final = 16 * 1024**2
_CHUNK_BYTES: Final = 1024**2
_NESTED: Final = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_METHODS: Final = frozenset({
    *(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA),
})
_OTHER_METHODS: Final = {9: "Deflate64", 93: "Zstandard", 95: "XZ", 98: "PPMd", 99: "AES"}
_DECOMPRESSORS: Final[dict[bytes, Callable[..., Any]]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


BROKEN: Final = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)
"""What the readers of the standard library raise when bytes are broken (or encrypted, or odd)."""


class UnsafeMember(Refused):
    """A member that would reach beyond the archive's folder, or is no plain file."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__("archive_unsafe_member", f"The member {_shown(name)} {why}.")


class BrokenArchive(Refused):
    """A file whose bytes are not those of an archive, or not to their end."""

    def __init__(self, detail: str) -> None:
        super().__init__("dataset_invalid", detail)


class Archive(Protocol):
    """The files of an archive, by their safe relative names."""

    @property
    def names(self) -> frozenset[str]:
        """Return the names of the files."""

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Return at most `max_bytes` and one of a file's bytes, whatever its header says."""

    def close(self) -> None:
        """Close the archive."""


class ZipArchive:
    """A zip file."""

    def __init__(self, path: Path) -> None:
        """Open and judge it.

        Raises:
            BrokenArchive: If it is broken.
            Refused: If it is beyond the limits.
        """
        try:
            self._zip = zipfile.ZipFile(path)
        except BROKEN:
            raise BrokenArchive("The zip file is broken.") from None
        try:
            self.names = self._judged(path.stat().st_size)
        except Refused:
            self._zip.close()
            raise

    def _judged(self, packed: int) -> frozenset[str]:
        # Writers on Windows end the name of a folder with a backslash.
        infos = [info for info in self._zip.infolist() if info.filename[-1:] not in {"/", "\\"}]
        for info in infos:
            _refuse_zip_member(info)
        _refuse_overlap(infos)
        _refuse_ratio(sum(info.file_size for info in infos), packed)
        named = [(zip_member_name(info), info) for info in infos]
        self._members = {normalize_path(name): info for name, info in named}
        return judge((name, info.file_size) for name, info in named)

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        return cast("BinaryIO", self._zip.open(self._members[name]))

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Return at most `max_bytes` and one of a file's bytes."""
        with self.open(name) as file:
            return file.read(max_bytes + 1)

    def close(self) -> None:
        """Close the archive."""
        self._zip.close()


class TarArchive:
    """A tar file, not compressed (`inflate` comes first)."""

    def __init__(self, path: Path) -> None:
        """Open and judge it.

        Raises:
            BrokenArchive: If it is broken.
            Refused: If it is beyond the limits.
            UnsafeMember: If a member is no plain file.
        """
        try:
            self._tar = tarfile.open(path, mode="r:")  # noqa: SIM115 - closed by `close`
        except BROKEN:
            raise BrokenArchive("The tar file is broken.") from None
        try:
            members = self._list()
            for member in members:
                if not member.isreg() or member.issparse():
                    raise UnsafeMember(member.name, "is a link, a device or another special file")
            self.names = judge((member.name, member.size) for member in members)
        except BROKEN:
            self._tar.close()
            raise BrokenArchive("The tar file is broken.") from None
        except Refused:
            self._tar.close()
            raise
        self._members = {normalize_path(member.name): member for member in members}

    def _list(self) -> list[tarfile.TarInfo]:
        members = []
        for count, member in enumerate(self._tar):
            if count > MAX_MEMBERS:
                break
            if not member.isdir():
                members.append(member)
        return members

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading.

        Raises:
            OSError: If the archive is broken there.
        """
        file = self._tar.extractfile(self._members[name])
        if file is None:
            raise OSError(f"{name} cannot be read")
        return cast("BinaryIO", file)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Return at most `max_bytes` and one of a file's bytes."""
        with self.open(name) as file:
            return file.read(max_bytes + 1)

    def close(self) -> None:
        """Close the archive."""
        self._tar.close()


def judge(members: Iterable[tuple[str, int]]) -> frozenset[str]:
    """Return the normalized names of an archive's files, or refuse the archive.

    Files that a system added to those of its user (`__MACOSX/`, `Thumbs.db`) are left out.

    Raises:
        Refused: If a name comes twice, or a limit is passed.
        UnsafeMember: If a name leads out of the archive's folder.
    """
    names: dict[str, str] = {}
    total = 0
    for count, (raw, size) in enumerate(members):
        name = normalize_path(raw)
        # Icon\r is macOS's own, and the one name with a control character that is harmless.
        plain = name.removesuffix("\r") if name.endswith("Icon\r") else name
        if not is_safe_path(plain) or raw.startswith("/"):
            raise UnsafeMember(raw, "does not stay inside the archive's folder")
        if is_added_by_system(name):
            continue
        if name.lower().endswith(_NESTED):
            raise Refused("archive_limits", f"{_shown(name)} is an archive inside the archive.")
        key = name.casefold()
        if key in names:
            raise Refused(
                "archive_limits",
                f"{_shown(raw)} comes twice: it is the same name as {_shown(names[key])} on some"
                " systems (case, accents and `\\` do not count). Rename one of them.",
            )
        total += size
        if count >= MAX_MEMBERS or total > MAX_TOTAL_BYTES:
            detail = f"An archive holds at most {MAX_MEMBERS} files and {MAX_TOTAL_BYTES} bytes."
            raise Refused("archive_limits", detail)
        names[key] = name
    return frozenset(names.values())


def open_archive(path: Path, *, inflated: Path, max_bytes: int, stack: ExitStack) -> Archive | None:
    """Open a zip or tar, compressed or not, by its first bytes; none if it is neither.

    Args:
        path: The file.
        inflated: Where to decompress it to, if need be.
        max_bytes: Largest size of that.
        stack: Closes the archive.
    """
    with path.open("rb") as file:
        head = file.read(512)
    opened: ZipArchive | TarArchive
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        opened = ZipArchive(path)
    else:
        if inflate(path, inflated, max_bytes=max_bytes):
            path = inflated
            with path.open("rb") as file:
                head = file.read(512)
        if head[257:262] != b"ustar":
            return None
        opened = TarArchive(path)
    stack.callback(opened.close)
    return opened


def inflate(path: Path, target: Path, *, max_bytes: int = MAX_TOTAL_BYTES) -> bool:
    """Decompress a gzip, bzip2 or xz file; false if it is none of them.

    Raises:
        BrokenArchive: If it is broken. Beyond the limits it is a `Refused` as well.
    """
    with path.open("rb") as file:
        head = file.read(6)
    opener = next(
        (found for magic, found in _DECOMPRESSORS.items() if head.startswith(magic)), None
    )
    if opener is None:
        return False
    packed = path.stat().st_size
    size = 0
    try:
        with opener(path, "rb") as source, target.open("wb") as sink:
            while chunk := source.read(_CHUNK_BYTES):
                size += len(chunk)
                _refuse_ratio(size, packed, max_bytes=max_bytes)
                sink.write(chunk)
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not the file's fault: the disk is full, or the file too large for it
        raise BrokenArchive("The compressed file is broken.") from None
    return True


def _refuse_ratio(size: int, packed: int, *, max_bytes: int = MAX_TOTAL_BYTES) -> None:
    bomb = size > _RATIO_FROM_BYTES and size > MAX_RATIO * packed
    if bomb or size > max_bytes:
        detail = (
            f"The archive unpacks to more than {MAX_RATIO} times its size"
            f" or beyond {max_bytes} bytes."
        )
        raise Refused("archive_limits", detail)


def _refuse_zip_member(info: zipfile.ZipInfo) -> None:
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) not in {0, stat.S_IFREG}:
        raise UnsafeMember(info.filename, "is a link, a device or another special file")
    if info.flag_bits & 1:
        raise Refused("archive_limits", f"{_shown(info.filename)} is encrypted.")
    if info.compress_type not in _METHODS:
        method = _OTHER_METHODS.get(info.compress_type, f"method {info.compress_type}")
        detail = (
            f"{_shown(info.filename)} is compressed by {method}, which is not read; pack it by"
            " deflate, the usual method."
        )
        raise Refused("archive_limits", detail)
    if "\x00" in info.orig_filename:
        raise UnsafeMember(info.orig_filename, "has a NUL in its name")


def _refuse_overlap(infos: list[zipfile.ZipInfo]) -> None:
    ordered = sorted(infos, key=lambda info: info.header_offset)
    for before, after in pairwise(ordered):
        if before.header_offset + before.compress_size > after.header_offset:
            raise Refused("archive_limits", f"{_shown(after.filename)} overlaps another member.")


def _shown(name: str) -> str:
    return repr(name[:120].encode("ascii", "backslashreplace").decode())
