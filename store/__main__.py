"""Operator commands: `python -m store migrate` and `python -m store keys create|list|revoke`."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine

from store import keys, migrate
from store.database import create_engine_from, run_in_transaction, transaction
from store.errors import StoreError
from store.keys import Scope
from store.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 1 with one line that says why."""
    asked = _parser().parse_args(arguments)
    try:
        settings = Settings()
        command = {
            "migrate": _migrate,
            "create": _create_key,
            "list": _list_keys,
            "revoke": _revoke_key,
        }[asked.action]
        engine = create_engine_from(settings)
        try:
            print(command(engine, asked))  # noqa: T201 - an operator reads this
        finally:
            engine.dispose()
    except (StoreError, ValueError) as error:
        print(f"store: {error}", file=sys.stderr)  # noqa: T201 - as above
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m store", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("migrate", help="bring the tables to this version").set_defaults(
        action="migrate"
    )
    verbs = commands.add_parser("keys", help="API keys").add_subparsers(
        required=True, metavar="verb"
    )
    create = verbs.add_parser("create", help="make a key and print it, this once")
    create.set_defaults(action="create")
    create.add_argument("--team", required=True)
    create.add_argument("--name", required=True)
    create.add_argument("--scopes", default="read,write,infer", help="of read,write,infer,admin")
    create.add_argument("--expires-in-days", type=float)
    listing = verbs.add_parser("list", help="list keys, never their secrets")
    listing.set_defaults(action="list")
    listing.add_argument("--team")
    revoke = verbs.add_parser("revoke", help="make a key invalid")
    revoke.set_defaults(action="revoke")
    revoke.add_argument("id")
    return parser


def _migrate(engine: Engine, _: argparse.Namespace) -> str:
    before = migrate.current_revision(engine)
    migrate.upgrade(engine)
    after = migrate.current_revision(engine)
    return f"tables are at {after}" + (" (nothing to do)" if after == before else "")


def _create_key(engine: Engine, asked: argparse.Namespace) -> str:
    scopes = {Scope(scope.strip()) for scope in asked.scopes.split(",") if scope.strip()}
    expires_at = None
    if asked.expires_in_days is not None:
        expires_at = datetime.now(UTC) + timedelta(days=asked.expires_in_days)
    _, text = run_in_transaction(
        engine,
        lambda session: keys.create_key(
            session, team=asked.team, name=asked.name, scopes=scopes, expires_at=expires_at
        ),
    )
    return text


def _list_keys(engine: Engine, asked: argparse.Namespace) -> str:
    with transaction(engine, read_only=True) as session:
        rows = keys.list_keys(session, team=asked.team)
    lines = [
        f"{row.id}  {row.team}  {row.name}  grit_{row.prefix}_...  {','.join(row.scopes)}"
        + ("  revoked" if row.revoked_at is not None else "")
        for row in rows
    ]
    return "\n".join(lines) or "no keys"


def _revoke_key(engine: Engine, asked: argparse.Namespace) -> str:
    key = run_in_transaction(engine, lambda session: keys.revoke_key(session, asked.id))
    return f"revoked {key.id} ({key.name} of team {key.team})"


if __name__ == "__main__":
    sys.exit(main())
