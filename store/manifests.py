"""The manifest of a stored folder: which files, how many bytes, which SHA-256."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

MANIFEST_NAME: Final = "_objects.json"
"""Key below the folder's prefix; not `manifest.json`, which folders have of their own."""
_VERSION: Final = 1


@dataclass(frozen=True)
class FileEntry:
    """One file of a stored folder."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a stored folder, in the order of their paths."""

    files: tuple[FileEntry, ...]

    @classmethod
    def of_folder(cls, folder: Path) -> "Manifest":
        """Return the manifest of a local folder.

        Raises:
            ValueError: If the folder is empty or holds a link or a file of the manifest's name.
        """
        files: list[FileEntry] = []
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() or name == MANIFEST_NAME:
                raise ValueError(f"{path} cannot be stored: it is a link or a manifest")
            if path.is_file():
                files.append(FileEntry(name, path.stat().st_size, file_sha256(path)))
        if not files:
            raise ValueError(f"{folder} holds no file to store")
        return cls(tuple(files))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: If it is something else.
        """
        try:
            parsed = json.loads(data)
            files = tuple(
                FileEntry(str(file["path"]), int(file["size_bytes"]), str(file["sha256"]))
                for file in parsed["files"]
            )
            version = parsed["version"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"it is not a manifest ({type(error).__name__})") from error
        if version != _VERSION:
            raise ValueError(f"it is a manifest of version {version!r}, not {_VERSION}")
        return cls(files)

    def to_bytes(self) -> bytes:
        """Return the manifest as canonical JSON."""
        content = {"version": _VERSION, "files": [asdict(file) for file in self.files]}
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    @property
    def sha256(self) -> str:
        """The hash of the manifest's bytes: one name for the whole folder."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """The bytes of all files together."""
        return sum(file.size_bytes for file in self.files)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
