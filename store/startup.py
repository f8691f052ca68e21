"""The first steps of every process of the service, with words instead of tracebacks."""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

import structlog

from store.configuration.sources import InvalidSettings
from store.errors import StorageUnavailable, StoreError
from store.parts import try_broker
from store.settings import Settings, load_settings
from store.tables import check_tables

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from store.inference import Mailbox
    from store.objects import Objects

REFUSED: Final = 2
"""Exit status of a process that cannot start as it is set up."""
log = structlog.get_logger(__name__)


def load_settings_or_exit(program: str) -> Settings:
    """Return the settings from the environment.

    Args:
        program: What the lines on standard error begin with.

    Raises:
        SystemExit: If they cannot be used; standard error says why.
    """
    try:
        return load_settings()
    except InvalidSettings as error:
        refuse(program, error)


def check_tables_or_exit(program: str, engine: Engine) -> None:
    """Check that the database holds tables of this version. One that is away is waited for later.

    Args:
        program: What the lines on standard error begin with.
        engine: The database.

    Raises:
        SystemExit: If the database cannot be used before an operator acts.
    """
    try:
        warning = check_tables(engine)
    except StorageUnavailable as error:
        if not error.passing:
            refuse(program, error)
        log.warning("database_unavailable", reason=str(error))
    else:
        if warning is not None:
            log.warning("tables_newer", reason=warning)


def report_unavailable_parts(objects: Objects, mailbox: Mailbox | None = None) -> None:
    """Log, in the background, why the object store or the broker does not answer.

    Neither keeps a process from starting: it works as soon as they do.

    Args:
        objects: The object store.
        mailbox: The broker. None: another part of the process reports it.
    """
    tries = {"objects_unavailable": objects.ping}
    if mailbox is not None:
        tries["broker_unavailable"] = partial(try_broker, mailbox)

    def report() -> None:
        for event, attempt in tries.items():
            try:
                attempt()
            except (StoreError, OSError) as error:
                log.warning(event, reason=str(error))

    threading.Thread(target=report, name="start-report", daemon=True).start()


def refuse(program: str, error: Exception) -> NoReturn:
    """Say on standard error why a process cannot start, and end it.

    Raises:
        SystemExit: Always, with status 2.
    """
    for line in str(error).splitlines():
        sys.stderr.write(f"{program}: {line}\n")
    raise SystemExit(REFUSED)
