"""What a user should know of a dataset that was taken, in sentences."""

from collections.abc import Mapping
from typing import Any, Final

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
    unused = details.get("unused_files")
    if unused:
        first = (details.get("unused_file_names") or ["?"])[0]
        files = "1 file" if unused == 1 else f"{unused} files"
        notes.append(f"No row names {files} of the archive, such as {first}.")
    return notes
