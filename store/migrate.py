"""Bring the tables to the version of the code. Safe to run twice, and in several processes."""

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

MIGRATIONS_FOLDER: Final = Path(__file__).resolve().parents[1] / "migrations"
_LOCK: Final = 0x67726974
"""Key of PostgreSQL's advisory lock: "grit"."""


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Migrate up to a revision; another process that migrates is waited for."""
    with engine.begin() as connection:
        _wait_for_others(connection)
        command.upgrade(alembic_config(connection), revision)


def downgrade(engine: Engine, revision: str) -> None:
    """Migrate down to a revision; `base` removes every table."""
    with engine.begin() as connection:
        _wait_for_others(connection)
        command.downgrade(alembic_config(connection), revision)


def current_revision(engine: Engine) -> str | None:
    """Return the revision of the database's tables; none for an empty database."""
    with engine.connect() as connection:
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


def _wait_for_others(connection: Connection) -> None:
    """Hold off other migrations; on SQLite the transaction itself is the lock."""
    if connection.dialect.name != "postgresql":
        return
    connection.execute(text("SET LOCAL lock_timeout = '60s'"))
    connection.execute(text("SET LOCAL statement_timeout = '60s'"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    # A table in use is waited for shortly only: the waiting would stop everybody behind it.
    connection.execute(text("SET LOCAL lock_timeout = '2s'"))
