"""Tables and lists for a person to read."""

from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any, Final

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from grit_client.commands.console import UNBOUNDED
from grit_client.terminal_text import printable

_LEAST_ROOM: Final = 12
"""Columns of a value, however narrow the terminal."""
_PROSE: Final = 40
"""A longer value is prose, whose lines may be broken between words."""
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


class Listing:
    """Rows of values: a table where it fits, else a block of lines for each row.

    No value is ever cut or broken: an id has to be copied whole.
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        title: str = "",
        optional: Sequence[str] = (),
    ) -> None:
        """Take the rows.

        Args:
            columns: A name for each value of a row.
            rows: Numbers are set right, statuses are coloured, nothing is markup.
            title: Stands above.
            optional: Columns that a narrow table leaves out, the first one first.
        """
        self._columns, self._title, self._optional = list(columns), title, list(optional)
        self._rows = [list(row) for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for the width of a console."""
        for count in range(len(self._optional) + 1):
            left_out = self._optional[:count]
            grid = self._table([name for name in self._columns if name not in left_out])
            wide = options.update(width=UNBOUNDED)
            if Measurement.get(console, wide, grid).minimum <= options.max_width:
                yield grid
                if left_out:
                    yield Text(f"For a wider terminal: {', '.join(left_out)}.", style="dim")
                return
        if self._title:
            yield _line(Text(self._title, style="italic"))
        for index, row in enumerate(self._rows):
            if index:
                yield Text("")
            yield Facts(dict(zip(self._columns, row, strict=True)))

    def _table(self, names: Sequence[str]) -> Table:
        grid = Table(title=self._title or None, box=box.SIMPLE_HEAD, title_justify="left")
        indices = [self._columns.index(name) for name in names]
        for index in indices:
            values = [row[index] for row in self._rows]
            texts = [self._columns[index], *(cell(value).plain for value in values)]
            longest = max(map(len, texts))
            is_prose = longest > _PROSE
            # The least that is not broken: of prose, its longest word.
            least = max(len(word) for text in texts for word in text.split()) if is_prose else 0
            numbers = all(isinstance(value, int | float | None) for value in values)
            grid.add_column(
                self._columns[index],
                no_wrap=not is_prose,
                min_width=max(_PROSE, least) if is_prose else longest,
                justify="right" if numbers else "left",
            )
        for row in self._rows:
            grid.add_row(*[cell(row[index]) for index in indices])
        return grid


class Facts:
    """Names and values, one a line; a value that does not fit is broken between words only."""

    def __init__(self, pairs: Mapping[str, object]) -> None:
        """Take the pairs; a value that is None is left out."""
        self._pairs = {name: value for name, value in pairs.items() if value is not None}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for the width of a console."""
        indent = max((len(name) for name in self._pairs), default=0) + 2
        room = max(options.max_width - indent, _LEAST_ROOM)
        for name, value in self._pairs.items():
            shown = cell(value)
            first = True
            for paragraph in shown.plain.split("\n"):
                for part in wrap(
                    paragraph, room, break_long_words=False, break_on_hyphens=False
                ) or [""]:
                    label = f"{name if first else '':<{indent}}"
                    yield _line(Text.assemble((label, "dim"), (part, shown.style)))
                    first = False


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    optional: Sequence[str] = (),
) -> Listing:
    """Return rows as a table, or as blocks where a table does not fit; see `Listing`."""
    return Listing(columns, rows, title=title, optional=optional)


def facts(pairs: Mapping[str, object]) -> Facts:
    """Return names and values, one a line; what is None is left out."""
    return Facts(pairs)


def _line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ignore"
    return text


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
