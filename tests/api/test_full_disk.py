"""A full disk is said as such (507) wherever an upload meets it; nothing is left of it."""

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.conftest import Team, rows

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
