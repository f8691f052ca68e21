"""Tables and lists for a person to read."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from grit_client.terminal_text import printable

STATUS_STYLES = {
    "succeeded": "green",
    "ready": "green",
    "failed": "red",
    "rejected": "red",
    "running": "cyan",
    "queued": "yellow",
    "cancelled": "dim",
    "paused": "yellow",
}


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> Table:
    """A table; numbers are set right, statuses are coloured, nothing is markup."""
    grid = Table(*columns, title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    listed = [list(row) for row in rows]
    for index, column in enumerate(grid.columns):
        column.overflow = "fold"  # an id cut short could not be copied
        if all(isinstance(row[index], int | float | None) for row in listed):
            column.justify = "right"
    for row in listed:
        grid.add_row(*[cell(value) for value in row])
    return grid


def facts(pairs: Mapping[str, object]) -> Table:
    """Names and values, one a line; what is None is left out."""
    grid = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        if value is not None:
            grid.add_row(Text(name, style="dim"), cell(value))
    return grid


def cell(value: object) -> Text:
    """A value as text."""
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int):
        return Text(f"{value:,}")
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    text = printable(str(value))
    return Text(text, style=STATUS_STYLES.get(text, ""))


def size(num_bytes: Any) -> str | None:
    """Bytes in the unit that reads best."""
    if not isinstance(num_bytes, int | float):
        return None
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: Any) -> str | None:
    """Seconds as a person says them."""
    if not isinstance(seconds, int | float):
        return None
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def when(timestamp: Any) -> str | None:
    """A time of the wire, to the second."""
    return str(timestamp)[:19].replace("T", " ") if timestamp else None
