"""Bring the tables to the version of the code. Safe to run twice, and in several processes."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from store.database_errors import is_about_the_server, translate, translating_errors
from store.errors import StorageUnavailable
from store.tables import MIGRATIONS_FOLDER, SUPERSEDED, known_revisions

log = structlog.get_logger(__name__)


_LOCK: Final = 0x67726974
"""Key of PostgreSQL's advisory lock: "grit"."""
_PATIENCE_SECONDS: Final = 60.0


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Migrate up to a revision; another process that migrates is waited for.

    Raises:
        StorageUnavailable: If the database does not answer, tables stay in use for a minute, or
            the tables are of a revision that this code does not know.
        StorageFull: If its disk is full.
    """
    _check_known(engine)
    _until_done(engine, lambda connection: command.upgrade(alembic_config(connection), revision))


def downgrade(engine: Engine, revision: str) -> None:
    """Migrate down to a revision; `base` removes every table.

    Raises:
        StorageUnavailable: As `upgrade`.
    """
    _until_done(engine, lambda connection: command.downgrade(alembic_config(connection), revision))


def _until_done(engine: Engine, work: Callable[[Connection], None]) -> None:
    """Do a migration, again and again while jobs and requests hold what it needs.

    Raises:
        DBAPIError: If a statement of ours is wrong.
        StorageUnavailable: If the database does not answer, or cannot be used.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with migrating(engine) as connection:
                work(connection)
        except DBAPIError as error:
            if not is_about_the_server(error):
                raise
            found = translate(error)
            # With a state the database answers: a deadlock, or a lock that it gave us not in time.
            answers = getattr(error.orig, "sqlstate", None) is not None
            passing = answers and isinstance(found, StorageUnavailable) and found.passing
            if not passing or time.monotonic() > deadline:
                raise found from error
            log.warning("migration_waits", reason=str(found))
            time.sleep(random.uniform(0.05, 0.5))  # noqa: S311 - jitter
        else:
            return


@contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """Open the one transaction of a migration; another process that migrates is waited for."""
    with engine.connect() as connection, _rebuilding(connection), connection.begin():
        _wait_for_others(connection)
        yield connection
        _check_references(connection)


def current_revision(engine: Engine) -> str | None:
    """Return the revision of the database's tables; none for an empty database.

    Raises:
        StorageUnavailable: If the database does not answer.
    """
    with translating_errors(), engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def head_revision() -> str | None:
    """Return the revision that this code wants."""
    return ScriptDirectory.from_config(alembic_config(None)).get_current_head()


def alembic_config(connection: Connection | None) -> Config:
    """Return Alembic's configuration, which lives here and in no file."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_FOLDER).replace("%", "%%"))
    config.set_main_option(
        "file_template", "%%(year)d%%(month).2d%%(day).2d_%%(hour).2d%%(minute).2d_%%(slug)s"
    )
    config.set_main_option("truncate_slug_length", "60")
    config.attributes["connection"] = connection
    return config


def _check_known(engine: Engine) -> None:
    """Refuse to migrate tables that a newer version, or another program, has laid down.

    Raises:
        StorageUnavailable: If the revision of the tables is unknown here.
    """
    found = current_revision(engine)
    if found is not None and found not in known_revisions():
        raise StorageUnavailable(SUPERSEDED.format(found=found), passing=False)


@contextmanager
def _rebuilding(connection: Connection) -> Iterator[None]:
    """Let SQLite's tables be rebuilt: dropping one would empty those that refer to it.

    As SQLite's documentation of ALTER TABLE has it: foreign keys off, and checked at the end.
    """
    driver = connection.connection.driver_connection
    if connection.dialect.name != "sqlite" or driver is None:
        yield
        return
    driver.execute("PRAGMA foreign_keys=OFF")
    try:
        yield
    finally:
        driver.execute("PRAGMA foreign_keys=ON")


def _check_references(connection: Connection) -> None:
    """Refuse a migration that would leave rows which refer to nothing.

    Raises:
        RuntimeError: If there are such rows; nothing is committed.
    """
    if connection.dialect.name != "sqlite":
        return
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        tables = ", ".join(sorted({row[0] for row in broken}))
        raise RuntimeError(f"After the migration {len(broken)} rows refer to nothing: {tables}.")


def _wait_for_others(connection: Connection) -> None:
    """Hold off other migrations; on SQLite the transaction itself is the lock."""
    if connection.dialect.name != "postgresql":
        return
    connection.execute(text("SET LOCAL lock_timeout = '60s'"))
    connection.execute(text("SET LOCAL statement_timeout = '60s'"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    # A table in use is waited for shortly only: the waiting would stop everybody behind it.
    connection.execute(text("SET LOCAL lock_timeout = '2s'"))
