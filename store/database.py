"""The engine, and the one way to open a transaction. Nothing below the outermost caller commits."""

import math
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy
from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.orm import Session

from store.database_errors import translating_errors
from store.errors import StorageUnavailable
from store.folders import make_folder
from store.settings import Settings

Result = TypeVar("Result")

NETWORK_FILE_SYSTEMS: Final = frozenset({
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "ceph",
    "glusterfs",
    "fuse.sshfs",
    "lustre",
})
_READ_ONLY: Final = "grit_read_only"
_LONGEST_RETRYING_SECONDS: Final = 10.0


def create_engine_from(settings: Settings) -> Engine:
    """Return the engine for SQLite or PostgreSQL, with this deployment's time limits.

    Raises:
        ValueError: If the SQLite file is on a network file system, its folder cannot be made, or
            the driver of PostgreSQL is not installed.
    """
    url = sqlalchemy.make_url(settings.database_url)
    if settings.is_sqlite:
        return _sqlite_engine(url, settings)
    try:
        return _postgresql_engine(url, settings)
    except ImportError as error:  # psycopg, or the libpq below it
        raise ValueError(
            f"PostgreSQL's driver cannot be loaded ({error}); run: pip install 'psycopg[binary]'"
        ) from None


@contextmanager
def transaction(engine: Engine, *, read_only: bool = False) -> Iterator[Session]:
    """Open a session in one transaction: commit at the end, roll back on any exception.

    Rows stay readable after the commit. `read_only` takes no writer's turn on SQLite.

    Raises:
        StorageUnavailable: If the database does not answer, is locked or has no free connection.
        StorageFull: If its disk is full.
    """
    bound = engine.execution_options(**_options(engine, read_only=read_only))
    with (
        translating_errors(),
        Session(bound, expire_on_commit=False) as session,
        session.begin(),
    ):
        yield session


def run_in_transaction(
    engine: Engine, work: Callable[[Session], Result], *, tries: int = 5
) -> Result:
    """Run the whole of `work` in a transaction, again on a lost connection, deadlock or lock.

    `work` must be safe to repeat: every write of the store is a compare-and-set or has a unique
    key. A transaction whose commit was not answered is repeated too.

    Raises:
        StorageUnavailable: If the last try fails too.
        StorageFull: If the disk is full.
    """
    deadline = time.monotonic() + _LONGEST_RETRYING_SECONDS
    tried = 0
    while True:
        tried += 1
        try:
            with transaction(engine) as session:
                return work(session)
        except StorageUnavailable as error:
            if not error.passing or tried >= tries or time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.0, min(2.0, 0.05 * math.exp2(tried))))  # noqa: S311 - jitter


def _options(engine: Engine, *, read_only: bool) -> dict[str, Any]:
    if engine.dialect.name == "sqlite":
        return {_READ_ONLY: read_only}
    return {"postgresql_readonly": True} if read_only else {}


def _postgresql_engine(url: URL, settings: Settings) -> Engine:
    limits = {
        "statement_timeout": f"{settings.statement_timeout_seconds * 1000:.0f}",
        "lock_timeout": f"{settings.lock_timeout_seconds * 1000:.0f}",
        "idle_in_transaction_session_timeout": "15000",
        "timezone": "UTC",
    }
    return sqlalchemy.create_engine(
        url,
        pool_size=settings.pool_size,
        max_overflow=settings.pool_size,
        pool_timeout=settings.pool_timeout_seconds,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "connect_timeout": 3,
            "application_name": "grit",
            "options": " ".join(f"-c {name}={value}" for name, value in limits.items()),
        },
    )


def _sqlite_engine(url: URL, settings: Settings) -> Engine:
    if not url.database or url.database == ":memory:":
        raise ValueError("GRIT_DATABASE_URL: SQLite needs a file; rows must outlive the process")
    file = Path(url.database).absolute()
    make_folder(file.parent, what="the database's folder", setting="GRIT_HOME")
    kind = file_system_of(file.parent)
    if kind in NETWORK_FILE_SYSTEMS:
        raise ValueError(
            f"GRIT_DATABASE_URL: {file} is on a network file system ({kind}), where SQLite loses"
            " rows; use a local disk or PostgreSQL"
        )
    engine = sqlalchemy.create_engine(
        url,
        pool_size=settings.pool_size,
        max_overflow=4 * settings.pool_size,
        pool_timeout=settings.pool_timeout_seconds,
        hide_parameters=True,
        connect_args={"timeout": settings.busy_timeout_seconds},
    )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own implicit BEGIN is off; `_begin_sqlite` says which one it is to be.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    _keep_a_write_ahead_log(cursor)
    cursor.close()


def _keep_a_write_ahead_log(cursor: Any) -> None:
    """Turn the log on, once for a database's life.

    SQLite does not wait when several processes open a new database at once and all want to: those
    that lose are told that it is locked, and come again.

    Raises:
        sqlite3.OperationalError: It stays locked, or cannot be written at all.
    """
    deadline = time.monotonic() + _LONGEST_RETRYING_SECONDS
    while cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.01, 0.05))  # noqa: S311 - jitter


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def file_system_of(folder: Path) -> str:
    """Return the kind of file system that holds a folder; empty where the system does not tell."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    best, kind = Path("/"), ""
    real = folder.resolve()
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, found, *_ = line.split()
        mount = Path(point.replace("\\040", " "))
        if real.is_relative_to(mount) and len(mount.parts) >= len(best.parts):
            best, kind = mount, found
    return kind
