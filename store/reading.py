"""Statements that only read and need no common snapshot, at one round trip each."""

from collections.abc import Callable
from typing import Final, TypeVar

import sqlalchemy
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from store.database import transaction
from store.database_errors import translating_errors
from store.errors import StorageUnavailable

Result = TypeVar("Result")

CONNECTIONS: Final = 2
"""Of a reader; so many threads may use it at once without waiting."""


class Reader:
    """Reads the rows of an engine's database. Safe to share between threads.

    On PostgreSQL a statement is its own transaction, on connections of the reader's own: no BEGIN,
    no COMMIT, and no ping before each use. A connection that was lost since shows at the statement,
    which is then tried once more on a new one. On SQLite all of that costs nothing, and the
    engine's own transactions are used.
    """

    def __init__(self, engine: Engine) -> None:
        """Prepare; nothing is connected yet. Disposing of the engine closes the reader too."""
        self._engine = engine
        self._own: Engine | None = None
        if engine.dialect.name == "postgresql":
            self._own = sqlalchemy.create_engine(
                engine.url,
                creator=engine.pool._creator,  # noqa: SLF001 - the same address, options and limits
                pool_size=CONNECTIONS,
                max_overflow=0,
                pool_timeout=engine.pool.timeout(),  # type: ignore[attr-defined] # it is a QueuePool
                isolation_level="AUTOCOMMIT",
                hide_parameters=True,
            )
            event.listen(engine, "engine_disposed", self._dispose)

    def run(self, work: Callable[[Session], Result]) -> Result:
        """Run statements that only read; `work` must be safe to repeat.

        Raises:
            StorageUnavailable: If the database does not answer, or no connection is free.
            StorageFull: If its disk is full.
        """
        try:
            return self._run_once(work)
        except StorageUnavailable as error:
            if not error.passing:
                raise
            return self._run_once(work)

    def _run_once(self, work: Callable[[Session], Result]) -> Result:
        if self._own is None:
            with transaction(self._engine, read_only=True) as session:
                return work(session)
        with translating_errors(), Session(self._own, expire_on_commit=False) as session:
            return work(session)

    def _dispose(self, _: Engine) -> None:
        if self._own is not None:
            self._own.dispose()
