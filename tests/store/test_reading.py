"""Reading at one round trip: on PostgreSQL and SQLite, and over a connection that was lost."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from store.database import create_engine_from
from store.errors import StorageUnavailable
from store.reading import Reader
from store.settings import Settings


@pytest.fixture
def engine(postgres_url: str) -> Iterator[Engine]:
    made = create_engine_from(Settings(database_url=postgres_url))
    yield made
    made.dispose()


def test_a_lost_connection_is_not_seen_by_who_reads(engine: Engine) -> None:
    reader = Reader(engine)
    first = reader.run(lambda session: session.scalars(text("SELECT pg_backend_pid()")).one())
    with engine.begin() as other:
        other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": first})

    second = reader.run(lambda session: session.scalars(text("SELECT pg_backend_pid()")).one())

    assert second != first


def test_a_statement_is_its_own_transaction(engine: Engine) -> None:
    moments = Reader(engine).run(
        lambda session: [session.scalars(text("SELECT now()")).one() for _ in range(2)]
    )

    assert moments[0] < moments[1]


def test_a_database_that_is_away_is_said_to_be() -> None:
    away = create_engine_from(Settings(database_url="postgresql+psycopg://grit@127.0.0.1:1/none"))

    with pytest.raises(StorageUnavailable):
        Reader(away).run(lambda session: session.scalars(text("SELECT 1")).one())


def test_sqlite_is_read_too(sqlite_url: str) -> None:
    engine = create_engine_from(Settings(database_url=sqlite_url))

    assert Reader(engine).run(lambda session: session.scalars(text("SELECT 1")).one()) == 1
    engine.dispose()
