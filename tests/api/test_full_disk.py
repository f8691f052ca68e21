"""A full disk is said as such (507) wherever an upload meets it; nothing is left of it."""

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from store.settings import Settings
from tests.api.conftest import Team, opened, rows

DISK_BYTES = 1_600_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one or two megabytes, on which temporary files are made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    for privileged in ([], ["sudo", "-n"]):
        try:
            done = subprocess.run([*privileged, *command], check=False, capture_output=True)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            break
    else:
        pytest.fail("This test mounts a small file system: run it as root, or with sudo.")
    yield folder
    subprocess.run([*privileged, "umount", str(folder)], check=True)


@pytest.fixture
def full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    return small_disk


def tarred(size: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in (("data.jsonl", rows(2)), ("padding.txt", b"\0" * size)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("filename", "data"),
    [
        pytest.param("rows.jsonl", b"x" * 1_900_000, id="while it is received"),
        pytest.param("rows.jsonl", b"x" * 1_200_000, id="while it is copied"),
        pytest.param("rows.tar.gz", tarred(12 * 1024**2), id="while it is unpacked"),
    ],
)
def test_an_upload_that_meets_a_full_disk_is_answered_with_507(
    team: Team, full_disk: Path, filename: str, data: bytes
) -> None:
    answer = team.upload(data, filename=filename)
    assert answer.status_code == 507, answer.text
    problem = answer.json()
    assert problem["code"] == "storage_full"
    assert "no space" in problem["detail"].lower()
    assert str(full_disk) not in answer.text
    assert list(full_disk.iterdir()) == []
    assert team.get("/datasets").json()["data"] == []
    assert team.upload(rows(3)).status_code == 201


@pytest.mark.parametrize("part", ["objects", "database"])
def test_readiness_knows_a_full_disk_of_rows_or_objects(
    settings: Settings, small_disk: Path, part: str
) -> None:
    url = {"objects": f"file://{small_disk}/objects", "database": f"sqlite:///{small_disk}/grit.db"}
    update = {f"{part}_url": url[part], "min_free_bytes": 500_000}
    if part == "database":
        shutil.copyfile(settings.database_url.removeprefix("sqlite:///"), small_disk / "grit.db")
    with opened(settings.model_copy(update=update)) as app, TestClient(app) as client:
        assert client.get("/readyz").json()["checks"]["storage"] == "ok"
        filler = small_disk / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 100_000))
        full = client.get("/readyz")
        filler.unlink()
        again = client.get("/readyz")
    assert (full.status_code, full.json()["status"]) == (503, "unready")
    assert f"{part}: " in full.json()["checks"]["storage"]
    assert "GRIT_MIN_FREE_BYTES is 500,000" in full.json()["checks"]["storage"]
    assert str(small_disk) not in full.text
    assert (again.status_code, again.json()["checks"]["storage"]) == (200, "ok")


def test_readiness_speaks_of_full_temporary_files_and_still_serves(
    settings: Settings, full_disk: Path
) -> None:
    with (
        opened(settings.model_copy(update={"min_free_bytes": 10 * DISK_BYTES})) as app,
        TestClient(app) as client,
    ):
        (full_disk / "filler").write_bytes(b"x" * 1_000_000)
        ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert "temporary files: " in ready.json()["checks"]["storage"]


def test_readiness_remembers_a_write_that_found_no_space(team: Team, full_disk: Path) -> None:
    space = team.client.get("/readyz").json()["checks"]["storage"]
    assert "temporary files" in space  # 1.6 MB are less than the default bound
    (full_disk / "filler").unlink(missing_ok=True)
    assert team.upload(b"x" * 1_900_000).status_code == 507
    tempfile.tempdir = None
    ready = team.client.get("/readyz")
    assert ready.status_code == 200
    assert "a write found no space left" in ready.json()["checks"]["storage"]
