"""Unpack a downloaded adapter: nothing may be written outside its folder, nor by surprise."""

import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from grit_client.errors import UnsafeArchive

MAX_FILES = 1000
MAX_BYTES = 64 * 1024**3


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a zip or tar into a folder and return the files written.

    Only plain files and folders are accepted, with relative names that stay inside. The whole
    archive is judged before the first byte is written.

    Raises:
        UnsafeArchive: If it holds anything else, too much, or is no archive at all.
    """
    try:
        if zipfile.is_zipfile(archive):
            return _unpack_zip(archive, folder)
        if tarfile.is_tarfile(archive):
            return _unpack_tar(archive, folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise UnsafeArchive(f"The download is damaged: {error}.") from error
    raise UnsafeArchive("The download is neither a zip nor a tar archive.")


def _unpack_zip(archive: Path, folder: Path) -> list[Path]:
    with zipfile.ZipFile(archive) as container:
        entries = [entry for entry in container.infolist() if not entry.is_dir()]
        for entry in entries:
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in {0, stat.S_IFREG}:
                raise UnsafeArchive(f"{entry.filename!r} is not a plain file.")
        _check_size((entry.filename, entry.file_size) for entry in entries)
        targets = [(entry, _target(folder, entry.filename)) for entry in entries]
        for entry, target in targets:
            with container.open(entry) as source:
                _write(source, target)
    return [target for _, target in targets]


def _unpack_tar(archive: Path, folder: Path) -> list[Path]:
    with tarfile.open(archive) as container:
        entries = [entry for entry in container.getmembers() if not entry.isdir()]
        for entry in entries:
            if not entry.isfile():
                raise UnsafeArchive(f"{entry.name!r} is not a plain file.")
        _check_size((entry.name, entry.size) for entry in entries)
        targets = [(entry, _target(folder, entry.name)) for entry in entries]
        for entry, target in targets:
            source = container.extractfile(entry)
            if source is None:
                raise UnsafeArchive(f"{entry.name!r} is not a plain file.")
            with source:
                _write(source, target)
    return [target for _, target in targets]


def _check_size(entries: Iterator[tuple[str, int]]) -> None:
    sizes = [size for _, size in entries]
    if len(sizes) > MAX_FILES:
        raise UnsafeArchive(f"The archive holds {len(sizes)} files; at most {MAX_FILES} are taken.")
    if sum(sizes) > MAX_BYTES:
        raise UnsafeArchive(f"The archive unpacks to {sum(sizes)} bytes, above {MAX_BYTES}.")


def _target(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    if unsafe or "\x00" in name or not path.parts:
        raise UnsafeArchive(f"{name!r} would be written outside the folder.")
    return folder.joinpath(*path.parts)


def _write(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        raise UnsafeArchive(f"{target} is a link that is already there.")
    with target.open("wb") as file:
        shutil.copyfileobj(source, file)
