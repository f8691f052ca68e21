"""`grit keys create, list, rotate, revoke`."""

from typing import TYPE_CHECKING, Annotated

import typer

from grit_client.commands.choices import Scope
from grit_client.commands.names import resolve_key
from grit_client.commands.session import Session, with_session

if TYPE_CHECKING:
    from grit_client.answers import ApiKey

app = typer.Typer(help="API keys.")


@app.command()
@with_session
def create(
    session: Session,
    name: Annotated[str, typer.Argument(help="What it is for.", show_default=False)],
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="Repeatable; by default read, write and infer.", show_default=False),
    ] = None,
    team: Annotated[
        str | None, typer.Option(help="Whose it is; by default yours.", show_default=False)
    ] = None,
    expires_in_days: Annotated[
        float | None, typer.Option(help="It ends then; by default never.", show_default=False)
    ] = None,
) -> None:
    """Create a key; its text is shown this once."""
    with session.client() as client:
        scopes = scope or [Scope.READ, Scope.WRITE, Scope.INFER]
        key = client.create_key(name, scopes=scopes, team=team, expires_in_days=expires_in_days)
    _show(session, key)


@app.command()
@with_session
def rotate(
    session: Session,
    key_id: Annotated[str, typer.Argument(help="A key's id or name.", show_default=False)],
    overlap_seconds: Annotated[
        int | None,
        typer.Option(help="The old key goes on for so long; by default a day.", show_default=False),
    ] = None,
    expires_in_days: Annotated[
        float | None,
        typer.Option(help="The new key ends then; by default as the old.", show_default=False),
    ] = None,
) -> None:
    """Create a key in another's place; its text is shown this once."""
    with session.client() as client:
        key = client.rotate_key(
            resolve_key(client, key_id),
            overlap_seconds=overlap_seconds,
            expires_in_days=expires_in_days,
        )
    _show(session, key)


def _show(session: Session, key: "ApiKey") -> None:
    from grit_client.commands.tables import facts, when  # noqa: PLC0415 - for --help's sake

    pairs = {
        "id": key["id"],
        "team": key["team"],
        "scopes": " ".join(key["scopes"]),
        "expires (UTC)": when(key.get("expires_at")),
        "key": key["key"],
    }
    session.emit(key, lambda: facts(pairs))
    session.note("The key's text is kept nowhere; copy it now.")


@app.command("list")
@with_session
def list_(session: Session) -> None:
    """List the keys."""
    from grit_client.commands.tables import table, when  # noqa: PLC0415 - for --help's sake

    with session.client() as client:
        found = list(client.list_keys())
    columns = [
        *("key", "name", "team", "scopes", "starts with"),
        *("last used (UTC)", "expires (UTC)", "revoked (UTC)"),
    ]
    rows = [
        [
            item["id"], item["name"], item["team"], " ".join(item["scopes"]), item.get("prefix"),
            when(item.get("last_used_at")), when(item.get("expires_at")),
            when(item.get("revoked_at")),
        ]
        for item in found
    ]  # fmt: skip
    optional = ("revoked (UTC)", "starts with", "last used (UTC)", "team", "expires (UTC)")
    session.emit(found, lambda: table(columns, rows, optional=optional))


@app.command()
@with_session
def revoke(
    session: Session,
    key_id: Annotated[str, typer.Argument(help="A key's id or name.", show_default=False)],
) -> None:
    """Refuse a key from now on."""
    with session.client() as client:
        key_id = resolve_key(client, key_id)
        client.revoke_key(key_id)
    session.emit({"revoked": key_id}, lambda: f"Revoked {key_id}.")
