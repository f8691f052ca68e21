"""`python -m store check`."""

import argparse
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine

from store.errors import StoreError
from store.inference import Mailbox
from store.objects import Objects
from store.parts import try_broker, try_objects
from store.settings import load_settings
from store.tables import check_tables

if TYPE_CHECKING:
    from collections.abc import Callable


def add_to(commands: Any) -> None:
    """Add the verb."""
    check = commands.add_parser("check", help="try the settings, the database, objects and broker")
    check.set_defaults(run=_check, needs_tables=False)


def _check(engine: Engine, _: argparse.Namespace) -> str:
    """Return a line for each part.

    Raises:
        ValueError: If a part cannot be used; the message has the same lines.
    """
    settings = load_settings()
    mailbox = Mailbox(settings)
    tries: dict[str, Callable[[], str | None]] = {
        "tables": lambda: check_tables(engine),
        "objects": lambda: try_objects(Objects(settings)),
        "broker": lambda: try_broker(mailbox),
    }
    lines, failed = ["settings: ok"], False
    try:
        for part, attempt in tries.items():
            try:
                lines.append(f"{part}: {attempt() or 'ok'}")
            except (StoreError, OSError) as error:
                failed = True
                lines.append(f"{part}: {error}")
    finally:
        mailbox.close_sync()
    if failed:
        raise ValueError("\n".join(lines))
    return "\n".join(lines)
