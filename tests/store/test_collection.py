"""What is collected, and what is kept: rows are always right, and so is doubt."""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog
from sqlalchemy import Engine, select, update

from store import attempts, base_models, collection, datasets, jobs
from store.adapters import create_adapter
from store.attempt_logs import chunk_key
from store.collection import MARK_KEY, Report, collect, collect_if_due, preview
from store.database import create_engine_from, transaction
from store.database_time import database_time_in
from store.models import (
    Adapter,
    AdapterOrigin,
    Checkpoint,
    Collection,
    DatasetStatus,
    IdempotencyKey,
    Job,
    JobStatus,
)
from store.objects import Objects
from store.orphans import Group, log_key
from store.settings import Settings
from tests.builders import MODEL, TEAM, claim, job_in, new_job, prepare, queued_job

HOUR_SECONDS = 3600.0
WEEK_SECONDS = 7 * 86_400.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, objects_url=f"file://{tmp_path}/objects")


@pytest.fixture
def store(settings: Settings) -> Objects:
    """Objects in a folder, whose files can be made old."""
    return Objects(settings)


def put(objects: Objects, settings: Settings, key: str, *, age_seconds: float) -> str:
    objects.put_bytes(key, b"x" * 10)
    age(Path(settings.objects_url.removeprefix("file://")) / key, age_seconds)
    return key


def age(file: Path, seconds: float) -> None:
    os.utime(file, (time.time() - seconds,) * 2)


def trusted(engine: Engine, objects: Objects, settings: Settings) -> None:
    """Leave a mark whose hold is over, as a deployment has after its first day."""
    assert collect(engine, objects, settings) is not None
    mark = json.loads(objects.get_bytes(MARK_KEY))
    objects.put_bytes(MARK_KEY, json.dumps({**mark, "held_until": mark["at"]}).encode())


def done(report: Report | None) -> Report:
    assert report is not None
    return report


def keys(objects: Objects) -> set[str]:
    return {found.key for found in objects.list()} - {MARK_KEY}


def owned(engine: Engine, objects: Objects, settings: Settings) -> set[str]:
    """Rows that refer to objects of every kind, all of them old, and the objects."""
    old = WEEK_SECONDS
    job = queued_job(engine)
    claimed = claim(engine)
    with transaction(engine) as session:
        row = create_adapter(
            session, team=TEAM, origin=AdapterOrigin.IMPORT, model=MODEL, prefix="adapters/adp_1"
        )
        slashed = create_adapter(
            session, team=TEAM, origin=AdapterOrigin.IMPORT, model=MODEL, prefix="adapters/adp_2/"
        )
        datasets.create_dataset(
            session, team=TEAM, status=DatasetStatus.READY, object_key="datasets/aa.jsonl"
        )
        attempts.save_checkpoint_pointer(
            session,
            job_id=job.id,
            attempt=claimed.attempt,
            step=2,
            prefix=f"jobs/{job.id}/a1/step-2",
        )
    wanted = [
        "datasets/aa.jsonl",
        f"{row.prefix}/adapter_model.safetensors",
        f"{row.prefix}/manifest.json",
        f"{slashed.prefix}manifest.json",
        f"jobs/{job.id}/a1/step-2/manifest.json",
        f"jobs/{job.id}/a1/step-2/step-2/deep/state.safetensors",
        log_key(job.id, 1),
        chunk_key(job.id, 1, 0),
    ]
    return {put(objects, settings, key, age_seconds=old) for key in wanted}


def orphaned(objects: Objects, settings: Settings, *, age_seconds: float) -> set[str]:
    """Objects of every kind that no row refers to."""
    wanted = [
        "datasets/bb.jsonl",
        "adapters/adp_9/adapter_model.safetensors",
        "adapters/adp_9/manifest.json",
        "jobs/job_9/a1/step-2/manifest.json",
        "jobs/job_9/a1/step-2/step-2/state.safetensors",
        "jobs/job_9/a1/log.txt",
        "jobs/job_9/a1/log.live/000000",
        "jobs/job_9/stray",
    ]
    return {put(objects, settings, key, age_seconds=age_seconds) for key in wanted}


def test_what_no_row_refers_to_goes_once_it_is_old_and_nothing_else(
    engine: Engine, store: Objects, settings: Settings
) -> None:
    trusted(engine, store, settings)
    kept = owned(engine, store, settings)
    job = next(key for key in kept if key.startswith("jobs/")).split("/")[1]
    superseded = {
        put(store, settings, f"jobs/{job}/{name}", age_seconds=WEEK_SECONDS)
        for name in ("a1/step-20/manifest.json", "a1/step-1/manifest.json", "a7/log.txt")
    }
    elsewhere = {put(store, settings, "somebody/else", age_seconds=WEEK_SECONDS)}
    young = put(store, settings, "adapters/adp_8/manifest.json", age_seconds=HOUR_SECONDS)
    slow = put(store, settings, "adapters/adp_8/adapter.safetensors", age_seconds=WEEK_SECONDS)
    gone = orphaned(store, settings, age_seconds=WEEK_SECONDS) | superseded
    before = keys(store)
    told = preview(engine, store, settings)
    assert keys(store) == before
    report = done(collect(engine, store, settings))
    assert keys(store) == kept | elsewhere | {young, slow}
    assert report.num_objects == told.num_objects == len(gone)
    assert report.size_bytes == 10 * len(gone)
    assert (report.num_flagged, report.held_until, report.dry_run) == (0, None, False)
    assert told.dry_run
    assert set(report.names) >= {"datasets/bb.jsonl", "adapters/adp_9", f"jobs/{job}/a7/log.txt"}
    assert done(collect(engine, store, settings)).num_objects == 0


def test_on_s3_too_what_no_row_refers_to_goes(
    production_settings: Settings, sqlite_engine: Engine
) -> None:
    patient = production_settings.model_copy(update={"collect_after_seconds": WEEK_SECONDS})
    settings = production_settings.model_copy(update={"collect_after_seconds": 1.0})
    store = Objects(settings)
    trusted(sqlite_engine, store, settings)
    store.put_bytes("adapters/adp_9/manifest.json", b"x")
    report = done(collect(sqlite_engine, store, patient))
    assert (report.num_groups, keys(store)) == (0, {"adapters/adp_9/manifest.json"})
    time.sleep(2.1)  # S3 tells whole seconds
    assert done(collect(sqlite_engine, store, settings)).num_groups == 1
    assert not keys(store)


def test_the_first_run_keeps_everything_for_a_day(
    sqlite_engine: Engine, store: Objects, settings: Settings
) -> None:
    flagged = orphaned(store, settings, age_seconds=WEEK_SECONDS)
    for _ in range(2):
        report = done(collect(sqlite_engine, store, settings))
        assert (report.num_flagged, report.num_groups) == (6, 0)
        assert report.held_until is not None
        left = report.held_until - datetime.now(UTC)
        assert timedelta(hours=23) < left <= timedelta(hours=24)
    assert keys(store) == flagged


def test_after_a_restore_of_the_rows_nothing_is_deleted_for_a_day(
    settings: Settings, sqlite_url: str, store: Objects, tmp_path: Path
) -> None:
    """F46: the rows of a week ago, beside objects of today."""
    settings = settings.model_copy(update={"database_url": sqlite_url})
    file, backup = Path(sqlite_url.removeprefix("sqlite:///")), tmp_path / "backup.db"
    engine = create_engine_from(settings)
    trusted(engine, store, settings)
    engine.dispose()  # which brings the log of SQLite into its file
    shutil.copy(file, backup)
    engine = create_engine_from(settings)
    made = owned(engine, store, settings)
    assert done(collect(engine, store, settings)).num_flagged == 0
    engine.dispose()
    shutil.copy(backup, file)
    engine = create_engine_from(settings)
    queued_job(engine)  # rows that are newer than all objects do not end the doubt
    for _ in range(3):
        report = done(collect(engine, store, settings))
        assert (report.num_groups, report.num_flagged > 0) == (0, True)
        assert keys(store) == made
    mark = json.loads(store.get_bytes(MARK_KEY))
    store.put_bytes(MARK_KEY, json.dumps({**mark, "held_until": mark["at"]}).encode())
    assert done(collect(engine, store, settings)).num_groups > 0
    assert not keys(store)
    engine.dispose()


def test_what_was_written_while_nobody_collected_is_kept_for_a_day(
    sqlite_engine: Engine, store: Objects, settings: Settings
) -> None:
    """A backup may be younger than the last run and older than these objects."""
    trusted(sqlite_engine, store, settings)
    before = orphaned(store, settings, age_seconds=WEEK_SECONDS)
    since = put(store, settings, "adapters/adp_5/manifest.json", age_seconds=2 * 86_400.0)
    mark = json.loads(store.get_bytes(MARK_KEY))
    at = (datetime.now(UTC) - timedelta(days=3)).isoformat()
    store.put_bytes(MARK_KEY, json.dumps({**mark, "at": at, "held_until": at}).encode())
    report = done(collect(sqlite_engine, store, settings))
    assert (report.num_flagged, report.num_objects) == (1, len(before))
    assert keys(store) == {since}
    assert done(collect(sqlite_engine, store, settings)).num_flagged == 1


def test_a_damaged_mark_is_no_permission(
    sqlite_engine: Engine, store: Objects, settings: Settings
) -> None:
    flagged = orphaned(store, settings, age_seconds=WEEK_SECONDS)
    for mark in (b"", b"[]", b'{"token": "x"}', b"\xff"):
        trusted(sqlite_engine, store, settings)
        store.put_bytes(MARK_KEY, mark)
        assert done(collect(sqlite_engine, store, settings)).num_groups == 0
    assert keys(store) == flagged


def test_of_many_processes_one_collects_in_each_interval(
    engine: Engine, store: Objects, settings: Settings
) -> None:
    started = threading.Barrier(6)

    def run() -> Report | None:
        started.wait()
        return collect_if_due(engine, store, settings)

    with ThreadPoolExecutor(6) as pool:
        reports = [each.result() for each in [pool.submit(run) for _ in range(6)]]
    assert len([each for each in reports if each is not None]) == 1
    with structlog.testing.capture_logs() as lines:
        assert collect_if_due(engine, store, settings) is None
    assert lines == []
    with transaction(engine) as session:
        session.execute(update(Collection).values(started_at=database_time_in(-HOUR_SECONDS - 1)))
    with structlog.testing.capture_logs() as lines:
        assert collect_if_due(engine, store, settings) is not None
    assert [(line["event"], line["num_groups"]) for line in lines] == [("collected", 0)]
    with transaction(engine) as session:
        session.execute(update(Collection).values(finished_at=None))
    assert collect(engine, store, settings) is None
    with transaction(engine) as session:
        session.execute(update(Collection).values(started_at=database_time_in(-HOUR_SECONDS)))
    assert collect(engine, store, settings) is not None


def test_an_upload_that_takes_up_an_old_object_keeps_it(
    engine: Engine, store: Objects, settings: Settings
) -> None:
    """The row is written, and not yet committed, when the object is about to be deleted."""
    key = put(store, settings, "datasets/bb.jsonl", age_seconds=WEEK_SECONDS)
    with transaction(engine) as session:
        prepare(session)
    group = Group(name=key, is_object=True, youngest=datetime.now(UTC))
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as session:
            datasets.create_dataset(session, team=TEAM, status=DatasetStatus.READY, object_key=key)
            deleting = pool.submit(collection._delete, engine, store, group)
            time.sleep(0.3)
        assert deleting.result() is False
    assert store.exists(key)


def ended(engine: Engine, status: JobStatus, *, age_seconds: float) -> Job:
    """An ended job with a checkpoint."""
    job = job_in(engine, status)
    with transaction(engine) as session:
        session.execute(
            update(Job).where(Job.id == job.id).values(finished_at=database_time_in(-age_seconds))
        )
        session.add(Checkpoint(job_id=job.id, step=4, attempt=1, prefix=f"jobs/{job.id}/a1/step-4"))
    return job


def steps(engine: Engine, job: Job) -> list[int]:
    with transaction(engine, read_only=True) as session:
        return [row.step for row in attempts.list_checkpoints(session, job.id)]


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED])
def test_ended_jobs_keep_their_checkpoints_for_a_week(
    engine: Engine, store: Objects, settings: Settings, status: JobStatus
) -> None:
    trusted(engine, store, settings)
    old = ended(engine, status, age_seconds=WEEK_SECONDS + 60)
    new = ended(engine, status, age_seconds=WEEK_SECONDS - 60)
    stored = {
        job.id: put(store, settings, f"jobs/{job.id}/a1/step-4/x", age_seconds=2 * WEEK_SECONDS)
        for job in (old, new)
    }
    assert preview(engine, store, settings).num_checkpoints == 1
    report = done(collect(engine, store, settings))
    assert report.num_checkpoints == 1
    assert (steps(engine, old), steps(engine, new)) == ([], [4])
    assert keys(store) == {stored[new.id]}


def test_a_retried_job_keeps_its_checkpoints(
    sqlite_engine: Engine, store: Objects, settings: Settings
) -> None:
    trusted(sqlite_engine, store, settings)
    job = ended(sqlite_engine, JobStatus.FAILED, age_seconds=WEEK_SECONDS + 60)
    with transaction(sqlite_engine) as session:
        jobs.retry_job(session, job.id, team=TEAM)
    assert done(collect(sqlite_engine, store, settings)).num_checkpoints == 0
    assert steps(sqlite_engine, job) == [4]
    with transaction(sqlite_engine) as session:
        assert collection._forget_checkpoints(session, job.id, settings) == []


def test_idempotency_keys_are_forgotten_after_three_days(
    engine: Engine, store: Objects, settings: Settings
) -> None:
    with transaction(engine) as session:
        dataset = prepare(session)
        for key in ("old", "new"):
            jobs.create_job(
                session,
                team=TEAM,
                spec=new_job(dataset),
                idempotency_key=key,
                request_hash="0",
            )
        for key, hours in (("old", 73), ("new", 71)):
            session.execute(
                update(IdempotencyKey)
                .where(IdempotencyKey.key == key)
                .values(created_at=database_time_in(-hours * HOUR_SECONDS))
            )
    assert preview(engine, store, settings).num_idempotency_keys == 1
    assert done(collect(engine, store, settings)).num_idempotency_keys == 1
    with transaction(engine, read_only=True) as session:
        assert session.scalars(select(IdempotencyKey.key)).all() == ["new"]


def test_a_run_deletes_so_much_at_most(
    sqlite_engine: Engine, store: Objects, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "MAX_GROUPS", 3)
    trusted(sqlite_engine, store, settings)
    orphaned(store, settings, age_seconds=WEEK_SECONDS)
    assert [done(collect(sqlite_engine, store, settings)).num_groups for _ in range(3)] == [3, 3, 0]


def test_what_an_interrupted_write_left_in_a_folder_goes_with_age(
    sqlite_engine: Engine, store: Objects, settings: Settings
) -> None:
    trusted(sqlite_engine, store, settings)
    folder = Path(settings.objects_url.removeprefix("file://")) / "adapters/adp_1"
    folder.mkdir(parents=True)
    for name, seconds in (("model.safetensors#1", WEEK_SECONDS), ("model.safetensors#2", 60.0)):
        (folder / name).write_bytes(b"torn")
        age(folder / name, seconds)
    assert done(collect(sqlite_engine, store, settings)).num_torn == 1
    assert [file.name for file in folder.iterdir()] == ["model.safetensors#2"]


def test_an_object_stored_before_its_row_is_there_when_the_row_comes(
    engine: Engine, store: Objects, settings: Settings
) -> None:
    """A completing attempt: the objects first, the row perhaps much later."""
    trusted(engine, store, settings)
    put(store, settings, "adapters/adp_7/manifest.json", age_seconds=23 * HOUR_SECONDS)
    stop = threading.Event()

    def collecting() -> int:
        runs = 0
        while not stop.is_set():
            runs += collect(engine, store, settings) is not None
        return runs

    with ThreadPoolExecutor(1) as pool:
        runs = pool.submit(collecting)
        time.sleep(0.3)
        with transaction(engine) as session:
            base_models.register(session, id=MODEL, source=MODEL)
            prepare(session)
            create_adapter(
                session,
                team=TEAM,
                origin=AdapterOrigin.IMPORT,
                model=MODEL,
                prefix="adapters/adp_7",
            )
        age(Path(settings.objects_url.removeprefix("file://"), "adapters/adp_7/manifest.json"), 9e9)
        time.sleep(0.3)
        stop.set()
        assert runs.result() > 1
    with transaction(engine, read_only=True) as session:
        (prefix,) = session.scalars(select(Adapter.prefix))
    assert store.exists(f"{prefix}/manifest.json")
