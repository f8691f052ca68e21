"""What every command has: an address, a key, a home, `--json`; and what its errors become.

The four options are accepted before the command and after it; the one nearest the command counts.
Standard output holds only the answer: JSON with `--json`, else text and tables. Progress and errors
go to standard error. Exit codes: 0 done, 1 the job failed, 2 refused input, 3 no service, 4 no
right, 5 not found, 130 interrupted, 141 the reader of the output is gone.
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

from grit_client.commands.usage import READER_GONE, discard_output
from grit_client.home import Home
from grit_client.terminal_text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from grit_client.client import GritClient

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
    key_source: str | None = None
    """`--key` or `GRIT_API_KEY`; None where the key is that of the home folder."""

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
            if isinstance(shown, str):
                # The terminal breaks its lines itself; what it breaks can still be copied whole.
                self.out.print(printable(shown), markup=False, soft_wrap=True)
            else:
                self.out.print(shown, markup=False, crop=False)  # its cells are clean already

    def emit_line(self, answer: Any) -> None:
        """Write an answer as one line of JSON, at once: one of a stream."""
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def leave(self, code: int) -> None:
        """End the command with an exit code.

        Raises:
            Exit: Always.
        """
        raise typer.Exit(code)

    @property
    def out(self) -> "Console":
        """Standard output."""
        return _open_console(error=False)

    @property
    def err(self) -> "Console":
        """Standard error."""
        return _open_console(error=True)

    def note(self, line: str) -> None:
        """Tell a person something on the side."""
        if not self.as_json:
            self.err.print(printable(line), style="dim", markup=False, soft_wrap=True)


def with_session(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that all commands have, as its first argument `session`.

    Errors that we expect become a message and an exit code; a traceback is a bug.
    """
    signature = inspect.signature(command)
    own = list(signature.parameters.values())[1:]

    @wraps(command)
    def run(ctx: typer.Context, **values: Any) -> None:
        for name in _SHARED:
            del values[name]
        session = build_session(ctx)
        from grit_client.commands.failures import report  # noqa: PLC0415 - not for `grit --help`

        try:
            command(session, **values)
        except BrokenPipeError:  # typer would end the command with 1
            discard_output()
            raise typer.Exit(READER_GONE) from None
        except Exception as error:
            code = report(
                error,
                console=session.err,
                home=session.home,
                as_json=session.as_json,
                url=session.url,
                key_source=session.key_source,
            )
            if code is None:
                raise
            raise typer.Exit(code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    keyword = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("ctx", keyword, annotation=typer.Context)
    parameters = [*[each.replace(kind=keyword) for each in own], *_shared_parameters(), context]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined] # typer reads it
    del run.__wrapped__  # else its annotations are read in place of ours
    return run


def accept_options_before_command(app: typer.Typer, *, version: bool = False) -> None:
    """Have a group of commands accept the options of `with_session` before its commands too.

    Args:
        app: The group.
        version: Whether it has `--version` as well.
    """

    def group(ctx: typer.Context, **_: Any) -> None:
        if ctx.invoked_subcommand is None:
            typer.echo(ctx.get_help())
            raise typer.Exit(2)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        *_shared_parameters(),
        inspect.Parameter("ctx", keyword, annotation=typer.Context),
    ]
    if version:
        annotation = Annotated[
            bool,
            typer.Option(
                "--version", callback=_show_version, is_eager=True, help="Show the version."
            ),
        ]
        parameters.append(
            inspect.Parameter("version", keyword, default=False, annotation=annotation)
        )
    group.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    app.callback(invoke_without_command=True)(group)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - rarely wanted

        typer.echo(f"grit {version('grit-service')}")
        raise typer.Exit


def build_session(ctx: typer.Context) -> Session:
    """Return the session that the options of a command and of the groups before it ask for."""
    found = {name: _find_option(ctx, name) for name in _SHARED}
    key, key_source = found["key"]
    return Session(
        url=found["url"][0],
        key=key,
        home=Home.at(found["home"][0]),
        as_json=bool(found["as_json"][0]),
        key_source={"COMMANDLINE": "--key", "ENVIRONMENT": "GRIT_API_KEY"}.get(key_source),
    )


def _find_option(ctx: typer.Context, name: str) -> tuple[Any, str]:
    """Return an option's value and its source: the one typed nearest the command, if any was."""
    current: Any = ctx
    while current is not None:
        source = current.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            return current.params[name], source.name
        current = current.parent
    source = ctx.get_parameter_source(name)
    return ctx.params.get(name), "" if source is None else source.name


def _shared_parameters() -> list[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (annotation, default) in _SHARED.items()
    ]


def _open_console(*, error: bool) -> "Console":
    from grit_client.commands.console import open_console  # noqa: PLC0415 - not for `grit --help`

    return open_console(error=error)
