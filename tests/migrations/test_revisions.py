"""Migrations on both databases: from nothing to the models, and back."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, inspect

from store import migrate
from store.__main__ import main
from store.database import create_engine_from, transaction
from store.keys import authenticate
from store.models import Base
from store.settings import Settings
from tests.builders import running_job

if TYPE_CHECKING:
    from tests.services import Postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.db"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = f"empty_{abs(hash(str(tmp_path)))}"
    yield server.create(name)
    server.drop(name)


@pytest.fixture
def empty(empty_url: str) -> Engine:
    return create_engine_from(Settings(database_url=empty_url))


def test_an_empty_database_migrates_to_exactly_the_models(empty: Engine) -> None:
    assert migrate.current_revision(empty) is None
    migrate.upgrade(empty)
    assert migrate.current_revision(empty) == migrate.head_revision()
    with empty.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Base.metadata) == []
        found = inspect(connection)
        for table in Base.metadata.tables.values():
            checks = {check["name"] for check in found.get_check_constraints(table.name)}
            wanted = {str(c.name) for c in table.constraints if str(c.name).startswith("ck_")}
            assert checks == wanted, table.name
    empty.dispose()


def test_a_migrated_database_serves_and_goes_back_to_nothing(empty: Engine) -> None:
    migrate.upgrade(empty)
    migrate.upgrade(empty)
    assert running_job(empty).attempt == 1
    migrate.downgrade(empty, "base")
    with empty.connect() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
    migrate.upgrade(empty)
    assert running_job(empty).attempt == 1
    empty.dispose()


def test_processes_that_migrate_at_once_wait_for_each_other(empty_url: str) -> None:
    errors: list[BaseException] = []

    def upgrade() -> None:
        engine = create_engine_from(Settings(database_url=empty_url))
        try:
            migrate.upgrade(engine)
        except Exception as error:  # noqa: BLE001 - the test tells what it was
            errors.append(error)
        finally:
            engine.dispose()

    threads = [threading.Thread(target=upgrade) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_an_operator_migrates_and_makes_a_key(
    empty_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRIT_DATABASE_URL", empty_url)
    assert main(["migrate"]) == 0
    assert main(["migrate"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (
        main(["keys", "create", "--team", "ml", "--name", "first", "--scopes", "read,admin"]) == 0
    )
    token = capsys.readouterr().out.strip()
    engine = create_engine_from(Settings())
    with transaction(engine, read_only=True) as session:
        caller = authenticate(session, token)
    assert (caller.team, caller.scopes) == ("ml", {"read", "admin"})
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert caller.key_id in listed
    assert token not in listed
    assert main(["keys", "revoke", caller.key_id]) == 0
    assert main(["keys", "list", "--team", "ml"]) == 0
    assert "revoked" in capsys.readouterr().out
    engine.dispose()


def test_an_operators_mistake_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("GRIT_DATABASE_URL", f"sqlite:///{tmp_path}/empty.db")
    assert main(["keys", "list"]) == 1
    assert "store migrate" in capsys.readouterr().err
    assert main(["migrate"]) == 0
    for wrong in (["--scopes", "root"], ["--scopes", ","], ["--team", "A B"]):
        assert main(["keys", "create", "--team", "ml", "--name", "x", *wrong]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
