"""Migrations on both databases: from nothing to the models, and back."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import IntegrityError

from store import audit, events, jobs, migrate
from store.__main__ import main
from store.adapters import create_adapter
from store.database import create_engine_from, transaction
from store.keys import authenticate
from store.models import Adapter, AdapterOrigin, ApiKey, Base, Job, JobKind, Team
from store.settings import Settings
from tests.builders import MODEL, TEAM, new_job, prepare, queued_job, running_job
from tests.store.test_device_binding import BATCH_SIZES, open_job, start_worker

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


def test_a_table_that_stays_in_use_ends_a_migration_in_words_and_changes_nothing(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRIT_DATABASE_URL", postgres_url)
    monkeypatch.setattr(migrate, "_PATIENCE_SECONDS", 1.0)
    engine = create_engine_from(Settings())
    migrate.downgrade(engine, "-1")
    before = migrate.current_revision(engine)
    with engine.connect() as reader:
        reader.execute(text("SELECT count(*) FROM jobs"))
        assert main(["migrate"]) == 1
        assert "lock timeout" in capsys.readouterr().err
        assert migrate.current_revision(engine) == before
    assert main(["migrate"]) == 0
    engine.dispose()


def test_a_database_that_is_not_there_is_one_line_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRIT_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    assert main(["migrate"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


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


def test_rows_of_the_first_revision_live_on_with_all_that_belongs_to_them(empty: Engine) -> None:
    migrate.upgrade(empty, "0001")
    _fill_first_revision(empty)
    migrate.upgrade(empty)
    with transaction(empty) as session:
        job = session.get_one(Job, "job_1")
        adapter = session.get_one(Adapter, "adp_1")
        assert (job.kind, job.retention_dataset_id, job.source_adapter_id) == (
            "training",
            None,
            None,
        )
        assert (adapter.origin, adapter.job_id, adapter.parent_id) == ("job", "job_1", None)
        # Rebuilding a table must not take along what cascades from it.
        assert len(events.read(session, "job_1")) == 1
    with empty.begin() as connection:  # an older process, still running, names none of the columns
        connection.execute(text(_OLD_JOB), {"id": "job_2"})
        kind = connection.execute(text("SELECT kind FROM jobs WHERE id = 'job_2'")).scalar_one()
    assert kind == "training"
    empty.dispose()


def test_a_step_back_keeps_jobs_and_adapters_and_forgets_compressions(empty: Engine) -> None:
    migrate.upgrade(empty)
    with transaction(empty) as session:
        dataset = prepare(session)
        trained, _ = jobs.create_job(
            session, team=TEAM, spec=new_job(dataset, retention_dataset_id=dataset)
        )
        source = create_adapter(
            session, team=TEAM, origin=AdapterOrigin.JOB, model=MODEL, prefix="a", job_id=trained.id
        )
        spec = new_job(dataset, kind=JobKind.COMPRESSION, source_adapter_id=source.id)
        compression, _ = jobs.create_job(session, team=TEAM, spec=spec)
        cut = create_adapter(
            session,
            team=TEAM,
            origin=AdapterOrigin.COMPRESSION,
            model=MODEL,
            prefix="b",
            job_id=compression.id,
            parent_id=source.id,
        )
    migrate.downgrade(empty, "0001")
    with empty.connect() as connection:
        assert connection.execute(text("SELECT id FROM jobs")).scalars().all() == [trained.id]
        told = connection.execute(text("SELECT DISTINCT job_id FROM events")).scalars().all()
        assert told == [trained.id]
        kept = connection.execute(text("SELECT id, origin, job_id FROM adapters ORDER BY prefix"))
        assert [tuple(row) for row in kept] == [
            (source.id, "job", trained.id),
            (cut.id, "job", None),
        ]
    migrate.upgrade(empty)
    with transaction(empty) as session:
        assert session.get_one(Job, trained.id).retention_dataset_id is None
    empty.dispose()


def test_teams_and_keys_of_the_second_revision_live_on_and_go_back(empty: Engine) -> None:
    migrate.upgrade(empty, "0002")
    old_team = "INSERT INTO teams (name, created_at) VALUES (:name, '2026-11-23 01:00')"
    with empty.begin() as connection:
        connection.execute(text(old_team), {"name": "ml"})
        connection.execute(
            text(
                "INSERT INTO api_keys (id, team, name, prefix, secret_sha256, scopes, created_at)"
                " VALUES ('key_1', 'ml', 'ci', 'p', 's', '[\"read\"]', '2026-11-23 01:00')"
            )
        )
    migrate.upgrade(empty)
    with empty.begin() as connection:  # an older process, still running, names none of the columns
        connection.execute(text(old_team), {"name": "other"})
    with transaction(empty) as session:
        team = session.get_one(Team, "ml")
        assert (team.requests_per_minute, team.submissions_per_minute) == (None, None)
        assert session.get_one(ApiKey, "key_1").replaced_by is None
        audit.append(session, [audit.Entry(action="x", status=200)])
        team.requests_per_minute = 3
    migrate.downgrade(empty, "0002")
    with empty.connect() as connection:
        names = connection.execute(text("SELECT name FROM teams ORDER BY name")).scalars().all()
        assert names == ["ml", "other"]
        assert connection.execute(text("SELECT id FROM api_keys")).scalars().all() == ["key_1"]
        assert "audit" not in inspect(connection).get_table_names()
    migrate.upgrade(empty)
    with transaction(empty) as session:
        assert audit.verify(session).num_rows == 0
    empty.dispose()


@pytest.mark.parametrize(
    ("served", "device"), [((), "cpu"), (("cpu",), "cpu"), (("cpu", "mps"), "mps")]
)
def test_a_step_back_gives_the_jobs_of_a_strategy_the_first_device_that_is_served(
    empty: Engine, served: tuple[str, ...], device: str
) -> None:
    migrate.upgrade(empty)
    for queue in served:
        start_worker(empty, queue)
    waiting = open_job(empty, "cuda", "mps", "cpu")
    named = queued_job(empty)
    migrate.downgrade(empty, "0005")
    with empty.connect() as connection:
        found = connection.execute(text("SELECT id, queue, device, device_reason FROM jobs"))
        assert {row.id: tuple(row)[1:] for row in found} == {
            waiting.id: (device, device, f"{device} it is"),
            named.id: ("cpu", "cpu", None),
        }
    migrate.upgrade(empty)
    with transaction(empty, read_only=True) as session:
        job = session.get_one(Job, waiting.id)
        assert (job.device_options, job.training["batch_size"]) == (None, BATCH_SIZES[device])
    empty.dispose()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE jobs SET kind = 'merge'",
        "UPDATE jobs SET kind = NULL",
        "UPDATE jobs SET retention_dataset_id = 'ds_unknown'",
        "UPDATE jobs SET source_adapter_id = 'adp_unknown'",
        "UPDATE adapters SET parent_id = 'adp_unknown'",
        "UPDATE adapters SET origin = 'theft'",
    ],
)
def test_the_database_itself_refuses_what_is_not_in_the_models(
    empty: Engine, statement: str
) -> None:
    migrate.upgrade(empty)
    with transaction(empty) as session:
        job, _ = jobs.create_job(session, team=TEAM, spec=new_job(prepare(session)))
        create_adapter(
            session, team=TEAM, origin=AdapterOrigin.JOB, model=MODEL, prefix="a", job_id=job.id
        )
    with pytest.raises(IntegrityError), empty.begin() as connection:
        connection.execute(text(statement))
    empty.dispose()


_OLD_JOB = (
    "INSERT INTO jobs (id, team, status, metadata, model, dataset_id, request, config, training,"
    " plan, plan_hash, device, queue, priority, attempt, charged_attempts, max_attempts,"
    " infra_failures, last_sequence, version, created_at, updated_at) VALUES (:id, 'ml',"
    " 'succeeded', '{}', 'm', 'ds_1', '{}', '{}', '{}', '{}', '0', 'cpu', 'cpu', 0, 1, 1, 3, 0, 1,"
    " 2, '2026-11-23 01:00', '2026-11-23 01:00')"
)
_OLD_ROWS = """
INSERT INTO teams (name, created_at) VALUES ('ml', '2026-11-23 01:00');
INSERT INTO models (id, source, status, created_at, requested_at)
    VALUES ('m', 'm', 'ready', '2026-11-23 01:00', '2026-11-23 01:00');
INSERT INTO datasets (id, team, status, created_at)
    VALUES ('ds_1', 'ml', 'ready', '2026-11-23 01:00');
INSERT INTO events (job_id, sequence, type, payload, created_at)
    VALUES ('job_1', 1, 'status_changed', '{}', '2026-11-23 01:00');
INSERT INTO adapters (id, team, job_id, origin, model, prefix, created_at)
    VALUES ('adp_1', 'ml', 'job_1', 'job', 'm', 'adapters/adp_1', '2026-11-23 01:00')
"""


def _fill_first_revision(engine: Engine) -> None:
    """Write rows as the first revision's code did: a job, its event and its adapter."""
    statements = _OLD_ROWS.split(";")
    with engine.begin() as connection:
        for statement in statements[:3]:
            connection.exec_driver_sql(statement)
        connection.execute(text(_OLD_JOB), {"id": "job_1"})
        for statement in statements[3:]:
            connection.exec_driver_sql(statement)
