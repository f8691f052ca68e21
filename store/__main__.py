"""Operator commands: `python -m store migrate|keys|teams|audit|collect`."""

import argparse
import sys
from collections.abc import Sequence

from sqlalchemy import Engine

from store import migrate
from store.commands import audit, collection, keys, teams
from store.database import create_engine_from
from store.errors import StoreError
from store.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 1 with one line that says why."""
    asked = _parser().parse_args(arguments)
    try:
        engine = create_engine_from(Settings())
        try:
            print(asked.run(engine, asked))  # noqa: T201 - an operator reads this
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
        run=_migrate
    )
    for noun in (keys, teams, audit, collection):
        noun.add_to(commands)
    return parser


def _migrate(engine: Engine, _: argparse.Namespace) -> str:
    before = migrate.current_revision(engine)
    migrate.upgrade(engine)
    after = migrate.current_revision(engine)
    return f"tables are at {after}" + (" (nothing to do)" if after == before else "")


if __name__ == "__main__":
    sys.exit(main())
