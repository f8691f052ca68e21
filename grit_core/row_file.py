"""A JSONL dataset on disk: rows reached by byte offset, so memory does not grow with the file."""

import hashlib
from array import array
from pathlib import Path
from typing import NamedTuple

from grit_core.errors import InvalidDataset
from grit_core.records import ChatRecord, InvalidRecord, images_beside, is_blank_line, parse_line


class RowPlace(NamedTuple):
    """Where one row lies."""

    offset_bytes: int
    length_bytes: int
    line: int
    """Line number in the file, from 1."""


class RowReader:
    """Reads single rows of a file whose places are known."""

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        """Prepare to read.

        Args:
            path: Chat rows, one JSON object a line; relative image paths start at its folder.
            name: What the user calls the file, for messages; its own name where that is `None`.
        """
        self.path = path
        self.name = name or path.name
        self._resolve_image = images_beside(path)

    def words(self, place: RowPlace) -> str:
        """Name a row in a message."""
        return f"{self.name}, line {place.line}"

    def record_at(self, place: RowPlace) -> ChatRecord:
        """Read and check one row.

        Raises:
            InvalidDataset: The row cannot be used; the message names the file and the line.
        """
        with self.path.open("rb") as file:
            file.seek(place.offset_bytes)
            data = file.read(place.length_bytes)
        try:
            return parse_line(data, line=place.line, resolve_image=self._resolve_image)
        except InvalidRecord as error:
            raise InvalidDataset(f"{self.name}, {error}") from error


class RowFile(RowReader):
    """The rows of one file, indexed by one pass over its bytes; blank lines are no rows.

    The index takes 20 bytes a row.
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        """Index the file.

        Args:
            path: Chat rows, one JSON object a line; relative image paths start at its folder.
            name: What the user calls the file, for messages; its own name where that is `None`.

        Raises:
            InvalidDataset: There is no such file, or it holds no row.
        """
        super().__init__(path, name=name)
        self._offsets, self._lengths, self._lines = array("Q"), array("Q"), array("I")
        digest = hashlib.sha256()
        offset = 0
        try:
            with path.open("rb") as file:
                for line, data in enumerate(file, start=1):
                    digest.update(data)
                    if not is_blank_line(data):
                        self._offsets.append(offset)
                        self._lengths.append(len(data.rstrip(b"\r\n")))
                        self._lines.append(line)
                    offset += len(data)
        except OSError as error:
            raise InvalidDataset(f"The dataset {path} cannot be read: {error.strerror}.") from error
        if not self._lines:
            raise InvalidDataset(f"The dataset {path} holds no row; write one JSON object a line.")
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self._lines)

    def place(self, index: int) -> RowPlace:
        """Say where a row lies."""
        return RowPlace(self._offsets[index], self._lengths[index], self._lines[index])

    def record(self, index: int) -> ChatRecord:
        """Read and check one row, as `record_at`."""
        return self.record_at(self.place(index))
