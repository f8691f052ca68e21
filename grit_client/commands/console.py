"""Consoles of standard output and error: terminals have a width, files and pipes have none."""

import os
import sys
from typing import Final

from rich.console import Console

UNBOUNDED: Final = 100_000
"""Columns where there is no terminal: a line is as long as what it holds."""


class PlainConsole(Console):
    """A console that raises where rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Leave a reader that is gone to the end of the command.

        Raises:
            BrokenPipeError: Always.
        """
        raise BrokenPipeError


def open_console(*, error: bool) -> PlainConsole:
    """Return a console for standard error, or for standard output."""
    stream = sys.stderr if error else sys.stdout
    # A width that the environment names counts for files too.
    named = os.environ.get("COLUMNS", "").isdecimal()  # noqa: TID251 - the terminal's, not ours
    width = None if stream.isatty() or named else UNBOUNDED
    return PlainConsole(stderr=error, highlight=False, width=width, soft_wrap=False)
