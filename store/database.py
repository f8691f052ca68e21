"""The engine, and the one way to open a transaction. Nothing below the outermost caller commits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from store.settings import Settings

Result = TypeVar("Result")


def create_engine_from(settings: Settings) -> Engine:
    """Return the engine for SQLite or PostgreSQL, with this deployment's time limits.

    Raises:
        ValueError: If the URL names another database, or a SQLite file on a network file system.
    """
    raise NotImplementedError


@contextmanager
def transaction(engine: Engine, *, read_only: bool = False) -> Iterator[Session]:
    """Open a session in one transaction: commit at the end, roll back on any exception.

    Rows stay readable after the commit. `read_only` takes no writer's turn on SQLite.

    Raises:
        StorageUnavailable: If the database does not answer, is locked or has no free connection.
        StorageFull: If its disk is full.
    """
    yield Session(engine)


def run_in_transaction(
    engine: Engine, work: Callable[[Session], Result], *, tries: int = 5
) -> Result:
    """Run the whole of `work` in a transaction, again on a lost connection, deadlock or lock.

    `work` must be safe to repeat: every write of the store is a compare-and-set or has a unique key.

    Raises:
        StorageUnavailable: If the last try fails too.
        StorageFull: If the disk is full.
    """
    raise NotImplementedError


def ping(engine: Engine) -> None:
    """Ask the database for a row, for readiness.

    Raises:
        StorageUnavailable: If it does not answer.
    """
    raise NotImplementedError
