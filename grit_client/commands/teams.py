"""`grit teams list, show, set`."""

from typing import TYPE_CHECKING, Annotated

import typer

from grit_client.commands.session import Session, with_session

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grit_client.answers import Team

app = typer.Typer(help="Teams: what they may have, and what they have.")

_DEFAULT = "default"
_Limit = Annotated[
    str | None, typer.Option(metavar="NUMBER|default", help="A whole number.", show_default=False)
]
_USED_BY = {
    "max_open_jobs": "open_jobs",
    "max_running_jobs": "running_jobs",
    "max_stored_bytes": "stored_bytes",
}


@app.command("list")
@with_session
def list_(session: Session) -> None:
    """List all teams with what they use; for administrators."""
    from grit_client.commands.tables import size, table  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        found = list(client.list_teams())
    columns = ["team", "open jobs", "running", "stored"]
    rows = [
        [
            item["name"], item["usage"]["open_jobs"], item["usage"]["running_jobs"],
            size(item["usage"]["stored_bytes"]),
        ]
        for item in found
    ]  # fmt: skip
    session.emit(found, lambda: table(columns, rows))


@app.command()
@with_session
def show(
    session: Session,
    name: Annotated[
        str | None, typer.Argument(help="A team; by default yours.", show_default=False)
    ] = None,
) -> None:
    """Show limits, and how much of them is used."""
    with session.client() as client:
        team = client.own_team() if name is None else client.get_team(name)
    session.emit(team, lambda: _limits(team))


@app.command("set")
@with_session
def set_(
    session: Session,
    name: Annotated[str, typer.Argument(help="A team.", show_default=False)],
    max_open_jobs: _Limit = None,
    max_running_jobs: _Limit = None,
    max_stored_bytes: _Limit = None,
    requests_per_minute: _Limit = None,
    submissions_per_minute: _Limit = None,
) -> None:
    """Set limits of a team; `default` gives it the deployment's again. For administrators."""
    given = {
        "max_open_jobs": max_open_jobs,
        "max_running_jobs": max_running_jobs,
        "max_stored_bytes": max_stored_bytes,
        "requests_per_minute": requests_per_minute,
        "submissions_per_minute": submissions_per_minute,
    }
    limits = {limit: _number(limit, text) for limit, text in given.items() if text is not None}
    with session.client() as client:
        team = client.set_team(name, limits)
    session.emit(team, lambda: _limits(team))


def _number(limit: str, text: str) -> int | None:
    """Return a limit's value.

    Raises:
        typer.BadParameter: If it is neither a whole number nor the word for the deployment's.
    """
    if text == _DEFAULT:
        return None
    if not text.isdecimal():
        option = f"--{limit.replace('_', '-')}"
        words = f"{text!r} is neither a whole number nor {_DEFAULT}"
        raise typer.BadParameter(words, param_hint=option)
    return int(text)


def _limits(team: "Team") -> "RenderableType":
    from grit_client.commands.tables import table  # noqa: PLC0415 - for --help's sake

    columns = ["limit", "used", "bound", "whose"]
    rows = []
    for name, bound in team["limits"].items():
        used = team["usage"].get(_USED_BY.get(name, ""))
        own = team["own_limits"].get(name) is not None
        rows.append([name, used, bound, "its own" if own else "the deployment's"])
    return table(columns, rows, title=team["name"])
