"""Every process of the service started wrongly: words, status 2, no traceback, no secret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from store import migrate
from store.database import create_engine_from
from store.settings import Settings
from store.tables import known_revisions
from tests.ports import reserve_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CANARY = "c4nary"
CELERY = (
    "-m",
    "celery",
    "-A",
    "worker.app",
    "worker",
    "--without-gossip",
    "--without-mingle",
    "-Q",
)
PROCESSES = {
    "store": ("-m", "store", "keys", "create", "--team", "ml", "--name", "first"),
    "api": ("-m", "api", "--port", "0"),
    "uvicorn": ("-m", "uvicorn", "api.app:create_app", "--factory", "--port", "0"),
    "worker-cpu": (*CELERY, "cpu", "--pool", "solo"),
    "worker-infer": (*CELERY, "infer.cpu", "--pool", "threads", "-c", "2"),
}
FORKING = {"train": (*CELERY, "cpu"), "infer": (*CELERY, "infer.cpu", "--pool", "prefork")}


def start(process: str, home: Path, **variables: str) -> tuple[int, str]:
    """Start a process that is to end by itself; return its status and all that it wrote."""
    given = {"GRIT_HOME": str(home), "GRIT_BROKER_URL": f"redis://127.0.0.1:{reserve_port()}/0"}
    done = subprocess.run(
        [sys.executable, *(PROCESSES | FORKING)[process]],
        cwd=ROOT,
        env={**os.environ, **given, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    assert CANARY not in text
    return done.returncode, text


@pytest.mark.parametrize("process", PROCESSES)
def test_wrong_settings_end_every_process_with_a_line_for_each_fault(
    process: str, tmp_path: Path
) -> None:
    status, text = start(
        process,
        tmp_path,
        GRIT_HEARTBEAT_SECOND="1",
        GRIT_POOL_SIZE="ten",
        GRIT_DATABASE_URL=f"postgres://u:{CANARY}#x@h/d",
        GRIT_S3_SECRET_ACCES_KEY=CANARY,
    )
    assert status == 2
    assert "GRIT_HEARTBEAT_SECOND is not a setting; did you mean GRIT_HEARTBEAT_SECONDS?" in text
    assert "GRIT_S3_SECRET_ACCES_KEY is not a setting" in text
    assert "GRIT_POOL_SIZE is 'ten'; it must be a whole number above 0" in text


@pytest.mark.parametrize("process", ["api", "worker-infer"])
def test_a_process_before_the_migration_says_to_run_it(process: str, tmp_path: Path) -> None:
    status, text = start(process, tmp_path)
    assert status == 2
    assert "The database has no tables of this service: run `python -m store migrate`." in text


@pytest.mark.parametrize("process", ["uvicorn", "worker-cpu"])
def test_a_process_on_tables_of_an_older_version_says_to_migrate_them(
    process: str, tmp_path: Path
) -> None:
    engine = create_engine_from(Settings(home=tmp_path))
    migrate.upgrade(engine, known_revisions()[0])
    engine.dispose()
    status, text = start(process, tmp_path)
    assert status == 2
    assert f"The tables are at revision {known_revisions()[0]!r}" in text
    assert "run `python -m store migrate`" in text


@pytest.mark.parametrize(
    ("process", "wanted"), [("train", "--pool solo"), ("infer", "--pool threads")]
)
def test_a_worker_whose_tasks_would_run_in_forks_names_the_pool(
    process: str, wanted: str, tmp_path: Path
) -> None:
    engine = create_engine_from(Settings(home=tmp_path))
    migrate.upgrade(engine)
    engine.dispose()
    status, text = start(process, tmp_path)
    assert status == 2
    assert f"needs {wanted}" in text


@pytest.mark.parametrize("process", ["api", "worker-cpu"])
def test_a_folder_that_cannot_be_made_is_named_with_its_setting(
    process: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    status, text = start(process, tmp_path / "file")
    assert status == 2
    assert f"{tmp_path / 'file'}" in text
    assert "set GRIT_HOME to a folder" in text


def test_a_folder_of_objects_that_cannot_be_made_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, text = start("api", tmp_path, GRIT_OBJECTS_URL=f"file://{tmp_path}/file/objects")
    assert status == 2
    assert f"the folder of objects {tmp_path}/file/objects cannot be made" in text
    assert "set GRIT_OBJECTS_URL" in text
