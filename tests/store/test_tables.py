"""An empty database, tables of another revision or program: words that say what to run."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import Engine, text

from store import migrate
from store.__main__ import main
from store.database import create_engine_from, transaction
from store.errors import StorageUnavailable
from store.keys import Scope, create_key
from store.settings import Settings
from store.tables import TablesOutdated, check_tables, known_revisions
from tests.services import Postgres

COMMANDS = [
    ("keys", "create", "--team", "ml", "--name", "first"),
    ("keys", "list"),
    ("teams", "list"),
    ("teams", "set", "ml", "--max-open-jobs", "5"),
    ("audit", "verify"),
    ("collect", "--dry-run"),
]


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """A database of each kind without any table."""
    monkeypatch.setenv("GRIT_HOME", str(tmp_path))
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/empty.db"
    else:
        server: Postgres = request.getfixturevalue("postgres")
        name = f"empty_{abs(hash(tmp_path))}"
        url = server.create(name)
    monkeypatch.setenv("GRIT_DATABASE_URL", url)
    engine = create_engine_from(Settings())
    yield engine
    engine.dispose()
    if request.param == "postgresql":
        server.drop(name)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def set_revision(engine: Engine, revision: str) -> None:
    with transaction(engine) as session:
        session.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": revision})


def test_the_revisions_that_are_read_from_files_are_alembics() -> None:
    script = ScriptDirectory.from_config(migrate.alembic_config(None))
    assert known_revisions() == tuple(
        each.revision for each in reversed(list(script.walk_revisions()))
    )


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_before_the_migration_says_to_run_it(
    empty: Engine, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert empty.url
    line = complaint(capsys, *arguments)
    assert line == (
        "store: The database has no tables of this service: run `python -m store migrate`."
    )


def test_older_tables_are_named_with_both_revisions_and_the_command(
    empty: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate.upgrade(empty, known_revisions()[-2])
    line = complaint(capsys, "keys", "list")
    assert known_revisions()[-2] in line
    assert f"needs {known_revisions()[-1]!r}: run `python -m store migrate`" in line
    assert main(["migrate"]) == 0
    assert check_tables(empty) is None


def test_newer_tables_are_used_with_a_warning_and_never_migrated(
    empty: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate.upgrade(empty)
    set_revision(empty, "9999")
    capsys.readouterr()
    assert main(["keys", "list"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "no keys\n"
    assert "warning: The tables are at revision '9999'" in printed.err
    assert "install that version" in complaint(capsys, "migrate")


def test_tables_of_another_program_are_not_mixed_with_ours(
    empty: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    with transaction(empty) as session:
        session.execute(text("CREATE TABLE jobs (id integer)"))
    assert "a database of its own" in complaint(capsys, "migrate")
    with pytest.raises(TablesOutdated, match="no tables of this service"):
        check_tables(empty)


def test_code_that_meets_no_tables_says_so_on_every_database(empty: Engine) -> None:
    with (
        pytest.raises(StorageUnavailable, match="store migrate") as refused,
        transaction(empty) as session,
    ):
        create_key(session, team="ml", name="first", scopes={Scope.READ})
    assert not refused.value.passing


def test_a_role_that_may_not_make_tables_is_said_so(
    postgres: Postgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "poor"
    postgres.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'poor'").format(sql.Identifier(name)))
    postgres.create(name)
    url = f"postgresql://poor:poor@127.0.0.1:{postgres.port}/{name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRIT_HOME", str(tmp_path))
        patch.setenv("GRIT_DATABASE_URL", url)
        line = complaint(capsys, "migrate")
    assert "permission denied" in line
    assert "make the service's role the owner" in line
    postgres.drop(name)
    postgres.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("absent:x@127.0.0.1:{port}/grit_template", "check the user in GRIT_DATABASE_URL"),
        ("grit@127.0.0.1:{port}/absent", "create the database"),
        ("grit@127.0.0.1:1/x", "check the host and port in GRIT_DATABASE_URL"),
        ("grit@localhost:1/x", "check the host and port in GRIT_DATABASE_URL"),
        ("grit@host.invalid/x", "check the host in GRIT_DATABASE_URL"),
    ],
)
def test_a_database_that_cannot_be_reached_says_what_to_check(
    rest: str,
    words: str,
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("GRIT_HOME", str(tmp_path))
    monkeypatch.setenv("GRIT_DATABASE_URL", f"postgres://{rest.format(port=postgres.port)}")
    for command in ("migrate", "check"):
        capsys.readouterr()
        assert main([command]) == 1
        printed = capsys.readouterr().err
        assert words in printed
        assert all(line.startswith("store: ") for line in printed.splitlines())


def test_a_file_that_is_no_database_and_a_folder_that_cannot_be_made_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRIT_HOME", str(tmp_path))
    (tmp_path / "grit.db").write_bytes(b"no database at all" * 100)
    assert "no SQLite database" in complaint(capsys, "migrate")
    monkeypatch.setenv("GRIT_HOME", str(tmp_path / "grit.db"))
    assert "set GRIT_HOME" in complaint(capsys, "migrate")


def test_a_driver_that_is_not_installed_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRIT_HOME", str(tmp_path))
    monkeypatch.setenv("GRIT_DATABASE_URL", "postgres://grit@127.0.0.1:1/x")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert "pip install 'psycopg[binary]'" in complaint(capsys, "migrate")
