"""What a user should know of a dataset that was taken, in sentences."""

from collections.abc import Mapping
from typing import Any, Final

from grit_core.errors import InvalidDataset
from grit_core.row_file import RowFile

READ_ROWS: Final = 1000
"""Rows of a local file that are looked at for notes."""
_SHOWN: Final = 20
"""Names of columns that a sentence lists."""


def dataset_notes(details: Mapping[str, Any]) -> list[str]:
    """Return the notes on a dataset: what was not read, and what was decided for its rows.

    Args:
        details: As the dataset's row holds them.
    """
    notes = []
    columns = [str(name) for name in details.get("ignored_columns") or []]
    if columns:
        more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
        named = ", ".join(columns[:_SHOWN])
        notes.append(f"The dataset has columns that are not read: {named}{more}.")
    placed = details.get("rows_with_placed_images")
    if placed:
        rows = "1 row" if placed == 1 else f"{placed} rows"
        notes.append(
            f"In {rows} the images of the column stand before the first user's words, since no"
            " part or <image> marker places them."
        )
    marked = details.get("rows_with_unused_markers")
    if marked:
        rows = "1 row" if marked == 1 else f"{marked} rows"
        notes.append(
            f"In {rows} a user's text holds <image> as words: no image of a column was left to"
            " take its place."
        )
    unused = details.get("unused_files")
    if unused:
        first = (details.get("unused_file_names") or ["?"])[0]
        files = "1 file" if unused == 1 else f"{unused} files"
        notes.append(f"No row names {files} of the archive, such as {first}.")
    return notes


def local_notes(file: RowFile) -> list[str]:
    """Return the notes on a local file, from its first `READ_ROWS` rows.

    A row that cannot be used is passed over: training refuses it.
    """
    columns: set[str] = set()
    num_placed = num_marked = 0
    for index in range(min(len(file), READ_ROWS)):
        try:
            record = file.record(index)
        except InvalidDataset:
            continue
        columns.update(record.ignored_columns)
        num_placed += record.num_placed_images > 0
        num_marked += record.keeps_markers
    notes = dataset_notes({
        "ignored_columns": sorted(columns),
        "rows_with_placed_images": num_placed,
        "rows_with_unused_markers": num_marked,
    })
    part = f"{file.name}: " if len(file) <= READ_ROWS else f"{file.name}, first {READ_ROWS} rows: "
    return [part + note for note in notes]
