"""Parquet files of rows, as Hugging Face and pandas write them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from api.intake.refusal import Refused
from api.intake.rows import Row, read_value, refuse_count
from grit_core.records import READ, foreign_format, may_bear_meaning

_BATCH_ROWS: Final = 64
_MAX_ROW_GROUP_BYTES: Final = 4 * 1024**3
_INDEX: Final = "__index_level_"
"""Columns that pandas adds for its index."""


class ParquetSource:
    """A Parquet file with `messages` and, in Hugging Face's way, `images` or `image` columns."""

    format = "parquet"

    def __init__(self, path: Path) -> None:
        """Open it and find its columns.

        Raises:
            Refused: If it is broken or has no `messages`.
        """
        # Loaded with the first such upload and not with the service.
        import pyarrow as pa  # noqa: PLC0415 - see above
        import pyarrow.parquet as pq  # noqa: PLC0415 - see above

        self._broken = (pa.ArrowException, OSError, ValueError)
        try:
            self._file = pq.ParquetFile(path)
            schema = self._file.schema_arrow
            columns = list(schema.names)
        except self._broken:
            raise Refused("dataset_invalid", "The Parquet file is broken.") from None
        metadata = self._file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        if any(group.total_byte_size > _MAX_ROW_GROUP_BYTES for group in groups):
            detail = f"A row group has more than {_MAX_ROW_GROUP_BYTES} bytes; write smaller ones."
            raise Refused("archive_limits", detail)
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:  # of which a row would hold the last
            named = ", ".join(twice)[:300]
            detail = f"The Parquet file has columns of the same name: {named}. Rename or drop them."
            raise Refused("dataset_invalid", detail)
        if "messages" not in columns:
            raise Refused("dataset_invalid", self._without_messages(columns))
        # Numbers say nothing that is read, and an embedding a row would be most of the file.
        self._columns = [
            name
            for name in columns
            if name in READ or may_bear_meaning(name) or not _holds_numbers(schema.field(name).type)
        ]
        self._ignored = [
            name for name in columns if name not in self._columns and not name.startswith(_INDEX)
        ]

    def _without_messages(self, columns: list[str]) -> str:
        """Return what to say of a file without chats; its first row may tell the format."""
        detail = f"The Parquet file has no column `messages`; it has: {', '.join(columns)[:300]}."
        try:
            first = next(self._file.iter_batches(batch_size=1), None)
            values = [] if first is None else first.to_pylist()
        except self._broken:
            return detail
        known = foreign_format(values[0]) if values else None
        return detail if known is None else f"{detail} {known.detail}"

    def rows(self) -> Iterator[Row]:
        """Yield every row; its number stands for its line.

        Raises:
            Refused: If the file is broken further on.
        """
        number = 0
        try:
            for batch in self._file.iter_batches(batch_size=_BATCH_ROWS, columns=self._columns):
                for value in batch.to_pylist():
                    number += 1
                    refuse_count(number)
                    yield read_value(number, value)
        except self._broken:
            raise Refused(
                "dataset_invalid", f"The Parquet file is broken after row {number}."
            ) from None

    def details(self) -> dict[str, Any]:
        """Return the columns of numbers, which are not read."""
        return {"ignored_columns": self._ignored} if self._ignored else {}


def _holds_numbers(kind: Any) -> bool:
    """Tell whether values of an Arrow type are numbers, times or lists of such."""
    from pyarrow import types  # noqa: PLC0415 - as above

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return bool(types.is_primitive(kind) or types.is_decimal(kind))
