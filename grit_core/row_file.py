"""A JSONL dataset on disk: rows reached by byte offset, so memory does not grow with the file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from grit_core.errors import InvalidDataset
from grit_core.records import ChatRecord, InvalidRecord, images_beside, is_blank_line, parse_line


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Where one row lies."""

    offset_bytes: int
    length_bytes: int
    line: int
    """Line number in the file, from 1."""


class RowFile:
    """The rows of one file, indexed by one pass over its bytes; blank lines are no rows."""

    def __init__(self, path: Path) -> None:
        """Index the file.

        Args:
            path: Chat rows, one JSON object a line; relative image paths start at its folder.

        Raises:
            InvalidDataset: There is no such file, or it holds no row.
        """
        self.path = path
        self.places: list[RowPlace] = []
        digest = hashlib.sha256()
        offset = 0
        try:
            with path.open("rb") as file:
                for line, data in enumerate(file, start=1):
                    digest.update(data)
                    if not is_blank_line(data):
                        self.places.append(RowPlace(offset, len(data.rstrip(b"\r\n")), line))
                    offset += len(data)
        except OSError as error:
            raise InvalidDataset(f"The dataset {path} cannot be read: {error.strerror}.") from error
        if not self.places:
            raise InvalidDataset(f"The dataset {path} holds no row; write one JSON object a line.")
        self.sha256 = digest.hexdigest()
        self._resolve_image = images_beside(path)

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.places)

    def record(self, index: int) -> ChatRecord:
        """Read and check one row.

        Raises:
            InvalidDataset: The row cannot be used; the message names the file and the line.
        """
        place = self.places[index]
        with self.path.open("rb") as file:
            file.seek(place.offset_bytes)
            data = file.read(place.length_bytes)
        try:
            return parse_line(data, line=place.line, resolve_image=self._resolve_image)
        except InvalidRecord as error:
            raise InvalidDataset(f"{self.path.name}, {error}") from error
