"""Operator commands: `python -m store check|migrate|keys|teams|audit|collect|settings`."""

import argparse
import sys
from collections.abc import Sequence

from sqlalchemy import Engine

from store import migrate
from store.commands import audit, check, collection, keys, settings, teams
from store.database import create_engine_from
from store.errors import StoreError
from store.startup import load_settings_or_exit
from store.tables import check_tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 1 with lines that say why.

    Raises:
        SystemExit: With status 2, if the command line or a setting cannot be used.
    """
    asked = _parser().parse_args(arguments)
    if getattr(asked, "describe", None) is not None:  # of the code, not of this deployment
        print(asked.describe())  # noqa: T201 - an operator reads this
        return 0
    found = load_settings_or_exit("store")
    try:
        engine = create_engine_from(found)
        try:
            if asked.needs_tables:
                _check_tables(engine)
            print(asked.run(engine, asked))  # noqa: T201 - as above
        finally:
            engine.dispose()
    except (StoreError, ValueError) as error:
        for line in str(error).splitlines():
            print(f"store: {line}", file=sys.stderr)  # noqa: T201 - as above
        return 1
    return 0


def _check_tables(engine: Engine) -> None:
    warning = check_tables(engine)
    if warning is not None:
        print(f"store: warning: {warning}", file=sys.stderr)  # noqa: T201 - as above


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m store", description=__doc__)
    parser.set_defaults(needs_tables=True)
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("migrate", help="bring the tables to this version").set_defaults(
        run=_migrate, needs_tables=False
    )
    for noun in (check, keys, teams, audit, collection, settings):
        noun.add_to(commands)
    return parser


def _migrate(engine: Engine, _: argparse.Namespace) -> str:
    before = migrate.current_revision(engine)
    migrate.upgrade(engine)
    after = migrate.current_revision(engine)
    return f"tables are at {after}" + (" (nothing to do)" if after == before else "")


if __name__ == "__main__":
    sys.exit(main())
