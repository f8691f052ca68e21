"""What every command has: an address, a key, a home, `--json`; and what its errors become.

Standard output holds the answer alone: JSON with `--json`, else text and tables. Progress and
errors go to standard error. Exit codes: 0 done, 1 the job failed, 2 refused input, 3 no service,
4 no right, 5 not found, 130 interrupted.
"""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grit_client.home import Home
from grit_client.terminal_text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from grit_client.client import GritClient

WIDE = 160
"""Columns of a table that is not for a terminal."""

_SHARED: dict[str, tuple[Any, Any]] = {
    "url": (
        Annotated[
            str | None,
            typer.Option(envvar="GRIT_URL", help="Address of the service.", show_default=False),
        ],
        None,
    ),
    "key": (
        Annotated[
            str | None,
            typer.Option(envvar="GRIT_API_KEY", help="API key.", show_default=False),
        ],
        None,
    ),
    "home": (
        Annotated[Path, typer.Option(envvar="GRIT_HOME", help="Folder of the embedded service.")],
        Path(".grit"),
    ),
    "as_json": (Annotated[bool, typer.Option("--json", help="Answer in JSON.")], False),
}


@dataclass(kw_only=True)
class Session:
    """One run of a command."""

    url: str | None
    key: str | None
    home: Home
    as_json: bool

    def client(self) -> "GritClient":
        """The service that the options name."""
        from grit_client.client import GritClient  # noqa: PLC0415 - not for `grit --help`
        from grit_client.connection import Retries  # noqa: PLC0415 - not for `grit --help`

        # A person waits: fewer and shorter pauses than a program would accept.
        patience = Retries(attempts=3, longest_seconds=5.0)
        return GritClient(self.url, self.key, home=self.home.folder, retries=patience)

    def emit(self, answer: Any, render: "Callable[[], RenderableType] | None" = None) -> None:
        """Write the answer: as JSON, or as `render` shows it (by default as text)."""
        if self.as_json:
            sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            shown = render() if render is not None else str(answer)
            # A text is somebody's words; a table has cleaned its cells already.
            self.out.print(printable(shown) if isinstance(shown, str) else shown, markup=False)

    def leave(self, code: int) -> None:
        """End the command with an exit code.

        Raises:
            Exit: Always.
        """
        raise typer.Exit(code)

    @property
    def out(self) -> "Console":
        """Standard output."""
        return _console(error=False)

    @property
    def err(self) -> "Console":
        """Standard error."""
        return _console(error=True)

    def note(self, line: str) -> None:
        """Tell a person something on the side."""
        if not self.as_json:
            self.err.print(printable(line), style="dim", markup=False)


def with_session(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that all commands have, as its first argument `session`.

    Errors that we expect become a message and an exit code; a traceback is a bug.
    """
    signature = inspect.signature(command)
    own = list(signature.parameters.values())[1:]
    shared = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for name, (annotation, default) in _SHARED.items()
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        session = Session(
            url=values.pop("url"),
            key=values.pop("key"),
            home=Home.at(values.pop("home")),
            as_json=values.pop("as_json"),
        )
        from grit_client.commands.failures import report  # noqa: PLC0415 - not for `grit --help`

        try:
            command(session, **values)
        except Exception as error:
            code = report(error, console=session.err, home=session.home, as_json=session.as_json)
            if code is None:
                raise
            raise typer.Exit(code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [*[parameter.replace(kind=keyword) for parameter in own], *shared]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined] # typer reads it
    del run.__wrapped__  # else its annotations are read in place of ours
    return run


def _console(*, error: bool) -> "Console":
    from rich.console import Console  # noqa: PLC0415 - not for `grit --help`

    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else WIDE
    return Console(stderr=error, highlight=False, width=width, soft_wrap=False)
