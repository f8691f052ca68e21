"""Transactions, their limits and what a caller learns when a database is ill."""

import sqlite3
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from store import keys
from store.database import (
    create_engine_from,
    file_system_of,
    run_in_transaction,
    transaction,
)
from store.database_time import database_now, database_time_in
from store.errors import StorageUnavailable
from store.models import ApiKey, Job, Team
from store.settings import Settings
from tests.builders import job_in
from tests.ports import reserve_port


def test_rows_outlive_a_commit_and_not_an_exception(engine: Engine) -> None:
    with transaction(engine) as session:
        team = keys.ensure_team(session, "kept")
    assert team.created_at.tzinfo is UTC

    def add_and_fail() -> None:
        with transaction(engine) as session:
            keys.ensure_team(session, "lost")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        add_and_fail()
    with transaction(engine, read_only=True) as session:
        assert session.scalars(select(Team.name)).all() == ["kept"]


def test_the_databases_clock_is_utc_and_moves_by_seconds(engine: Engine) -> None:
    with transaction(engine) as session:
        team = Team(name="x", last_claimed_at=database_time_in(90.5))
        session.add(team)
        session.flush()
        session.refresh(team)
        past, now, future = session.execute(
            select(
                Team.created_at > database_time_in(-5),
                Team.created_at <= database_now(),
                Team.last_claimed_at > database_time_in(89),
            )
        ).one()
    assert (past, now, future) == (True, True, True)
    assert abs(team.created_at - datetime.now(UTC)) < timedelta(seconds=10)
    assert team.last_claimed_at is not None
    assert timedelta(seconds=90) < team.last_claimed_at - team.created_at < timedelta(seconds=91)


def test_a_timestamp_comes_back_as_it_went_in(engine: Engine) -> None:
    moment = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
    with transaction(engine) as session:
        session.add(Team(name="x", last_claimed_at=moment.astimezone()))
    with transaction(engine, read_only=True) as session:
        assert session.get_one(Team, "x").last_claimed_at == moment


def test_a_naive_timestamp_is_refused(engine: Engine) -> None:
    naive = datetime(2026, 1, 1)  # noqa: DTZ001 - the point of the test
    with pytest.raises(Exception, match="no time zone"), transaction(engine) as session:
        session.add(Team(name="x", last_claimed_at=naive))


def test_a_key_of_no_team_and_a_status_of_no_list_are_refused(engine: Engine) -> None:
    job = job_in(engine, "queued")  # type: ignore[arg-type] # the wire string serves
    key = ApiKey(id="k", team="none", name="n", prefix="p", secret_sha256="0", scopes=[])
    with pytest.raises(IntegrityError), transaction(engine) as session:
        session.add(key)
    with pytest.raises(IntegrityError), transaction(engine) as session:
        session.execute(text("UPDATE jobs SET status = 'dancing'"))
    with transaction(engine, read_only=True) as session:
        assert session.get_one(Job, job.id).status == "queued"


def test_work_is_repeated_as_a_whole_after_a_passing_fault(engine: Engine) -> None:
    tries: list[int] = []

    def work(session: Session) -> str:
        tries.append(1)
        team = keys.ensure_team(session, f"try-{len(tries)}")
        if len(tries) < 3:
            raise StorageUnavailable("lost")
        return team.name

    assert run_in_transaction(engine, work) == "try-3"
    with transaction(engine, read_only=True) as session:
        assert session.scalars(select(Team.name)).all() == ["try-3"]
    tries.clear()
    with pytest.raises(StorageUnavailable):
        run_in_transaction(engine, work, tries=2)


def ping(engine: Engine) -> None:
    with transaction(engine, read_only=True) as session:
        session.execute(text("SELECT 1"))


def test_a_pool_without_a_free_connection_says_so_soon(database_url: str) -> None:
    settings = Settings(database_url=database_url, pool_size=1, pool_timeout_seconds=0.3)
    engine = create_engine_from(settings)
    overflow = engine.pool.size() + engine.pool._max_overflow  # type: ignore[attr-defined] # ours
    held = [engine.connect() for _ in range(overflow)]
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match="busy"):
        ping(engine)
    assert time.monotonic() - began < 2.5
    for connection in held:
        connection.close()
    ping(engine)
    engine.dispose()


def test_a_database_that_is_not_there_is_unavailable() -> None:
    url = f"postgresql+psycopg://grit@127.0.0.1:{reserve_port()}/none"
    engine = create_engine_from(Settings(database_url=url))
    with pytest.raises(StorageUnavailable, match="does not answer"):
        ping(engine)


def test_tables_that_are_not_there_name_the_command_that_makes_them(tmp_path: Path) -> None:
    engine = create_engine_from(Settings(home=tmp_path))
    with (
        pytest.raises(StorageUnavailable, match="store migrate"),
        transaction(engine, read_only=True) as session,
    ):
        session.scalars(select(Team)).all()
    engine.dispose()


def test_connections_killed_by_the_server_are_replaced(
    postgres_url: str, production_settings: Settings
) -> None:
    engine = create_engine_from(production_settings)
    ping(engine)
    address = postgres_url.replace("+psycopg", "").rsplit("/", 1)[0] + "/postgres"
    with psycopg.connect(address, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'grit' AND datname = %s",
            [postgres_url.rsplit("/", 1)[1]],
        )
    with transaction(engine) as session:
        keys.ensure_team(session, "after")
    engine.dispose()


def test_a_transaction_killed_in_its_middle_is_repeated(
    postgres_url: str, production_settings: Settings
) -> None:
    engine = create_engine_from(production_settings)
    address = postgres_url.replace("+psycopg", "").rsplit("/", 1)[0] + "/postgres"
    killed: list[Any] = []

    def work(session: Session) -> str:
        name = keys.ensure_team(session, "x").name
        if not killed:
            killed.append(session.scalar(text("SELECT pg_backend_pid()")))
            with psycopg.connect(address, autocommit=True) as admin:
                admin.execute("SELECT pg_terminate_backend(%s)", killed)
        session.execute(text("SELECT 1"))
        return name

    assert run_in_transaction(engine, work) == "x"
    assert len(killed) == 1
    engine.dispose()


def test_two_transactions_in_opposite_order_both_succeed(
    production_settings: Settings,
) -> None:
    engine = create_engine_from(production_settings)
    with transaction(engine) as session:
        keys.ensure_team(session, "a")
        keys.ensure_team(session, "b")
    barrier = threading.Barrier(2)
    met: set[str] = set()

    def bump(first: str, second: str) -> None:
        def work(session: Session) -> None:
            session.execute(
                text("UPDATE teams SET max_open_jobs = 1 WHERE name = :n"), {"n": first}
            )
            if first not in met:
                met.add(first)
                barrier.wait()
            session.execute(
                text("UPDATE teams SET max_open_jobs = 1 WHERE name = :n"), {"n": second}
            )

        run_in_transaction(engine, work)

    threads = [threading.Thread(target=bump, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    with transaction(engine, read_only=True) as session:
        assert session.scalars(select(Team.max_open_jobs)).all() == [1, 1]
    engine.dispose()


def test_a_writer_waits_for_another_process_that_holds_sqlite(sqlite_url: str) -> None:
    engine = create_engine_from(Settings(database_url=sqlite_url))
    other = sqlite3.connect(
        sqlite_url.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False
    )
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.5, lambda: other.execute("ROLLBACK"))
    release.start()
    with transaction(engine, read_only=True) as session:  # a reader does not wait
        assert session.scalars(select(Team)).all() == []
    with transaction(engine) as session:
        keys.ensure_team(session, "x")
    release.join()
    other.close()
    engine.dispose()


def test_sqlite_that_stays_locked_is_unavailable(sqlite_url: str) -> None:
    engine = create_engine_from(Settings(database_url=sqlite_url, busy_timeout_seconds=0.1))
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageUnavailable, match="locked"), transaction(engine) as session:
        keys.ensure_team(session, "x")
    other.close()
    engine.dispose()


def test_sqlite_is_opened_to_survive_a_power_cut(sqlite_url: str) -> None:
    engine = create_engine_from(Settings(database_url=sqlite_url))
    with transaction(engine) as session:
        pragmas = [
            session.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert pragmas == ["wal", 2, 1, 10_000]
    engine.dispose()


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_a_database_that_would_not_keep_rows_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="GRIT_DATABASE_URL"):
        create_engine_from(Settings(database_url=url))


def test_the_file_system_of_a_folder_is_known() -> None:
    if Path("/proc/self/mounts").exists():
        assert file_system_of(Path("/proc")) == "proc"
