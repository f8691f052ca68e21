"""Checkpoints on their way to the object store."""

from pathlib import Path

from sqlalchemy import Engine

from grit_core.checkpoints import load_checkpoint, save_checkpoint
from store import attempts
from store.database import transaction
from store.objects import Objects
from store.settings import Settings
from tests.builders import running_job
from tests.grit_core.test_checkpoints import checkpoint_at
from worker.uploads import CheckpointUploads


def test_what_is_stored_outlives_its_original_and_what_is_gone_was_overtaken(
    sqlite_engine: Engine, embedded_settings: Settings, tmp_path: Path
) -> None:
    job, failed = running_job(sqlite_engine), list[tuple[int, str]]()
    objects = Objects(embedded_settings)
    uploads = CheckpointUploads(
        sqlite_engine,
        objects,
        job_id=job.id,
        attempt=1,
        folder=tmp_path / "uploads",
        flush=lambda: True,
        on_failed=lambda step, reason: failed.append((step, reason)),
    )
    saved = tmp_path / "checkpoints"
    uploads.submit(4, save_checkpoint(saved, checkpoint_at(4)))
    for step in (6, 8):  # deletes what was submitted, before the thread has begun
        save_checkpoint(saved, checkpoint_at(step))
    uploads.start()
    try:
        assert uploads.drain(20)
        uploads.submit(5, saved / "step-5")
        assert uploads.drain(20)
    finally:
        uploads.close()
    assert failed == []
    with transaction(sqlite_engine, read_only=True) as session:
        (row,) = attempts.list_checkpoints(session, job.id)
    assert row.step == 4
    objects.get_folder(row.prefix, tmp_path / "back")
    assert load_checkpoint(tmp_path / "back" / "step-4").step == 4
