"""Scratch folders are swept when their worker is dead, and datasets are kept whole."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from store.errors import ObjectCorrupt
from store.manifests import file_sha256
from store.objects import Objects
from store.settings import Settings
from worker.scratch import DatasetCache, Scratch, snapshot

ROWS = b'{"messages": []}\n' * 100


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(Settings(home=tmp_path / "home"))


def upload(objects: Objects, data: bytes) -> tuple[str, str]:
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"datasets/{sha256}.jsonl"
    objects.put_bytes(key, data)
    return key, sha256


def test_a_dead_workers_folder_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from worker.scratch import Scratch;"
        "scratch = Scratch(Path(sys.argv[1]), 'wrk_dead'); scratch.new_folder();"
        "print('up', flush=True);"
        "input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    other.stdout.readline()
    scratch = Scratch(tmp_path, "wrk_alive")

    assert scratch.sweep() == []
    other.kill()
    other.communicate()
    assert scratch.sweep() == ["wrk_dead"]
    assert [folder.name for folder in scratch.root.iterdir()] == ["wrk_alive"]
    scratch.close()
    assert list(scratch.root.iterdir()) == []


def test_a_dataset_is_downloaded_once_and_damage_on_disk_is_repaired(
    tmp_path: Path, objects: Objects
) -> None:
    key, sha256 = upload(objects, ROWS)
    path = DatasetCache(tmp_path, bound_bytes=10**6).fetch(objects, key=key, sha256=sha256)
    objects.delete(key)
    assert DatasetCache(tmp_path, bound_bytes=10**6).fetch(objects, key=key, sha256=sha256) == path

    path.write_bytes(b"damaged")
    upload(objects, ROWS)
    again = DatasetCache(tmp_path, bound_bytes=10**6).fetch(objects, key=key, sha256=sha256)
    assert file_sha256(again) == sha256


def test_an_object_of_another_hash_is_refused_and_leaves_nothing(
    tmp_path: Path, objects: Objects
) -> None:
    key, sha256 = upload(objects, ROWS)
    objects.put_bytes(key, ROWS[1:])
    cache = DatasetCache(tmp_path, bound_bytes=10**6)

    with pytest.raises(ObjectCorrupt):
        cache.fetch(objects, key=key, sha256=sha256)
    assert list(cache.folder.iterdir()) == []


def test_the_least_recently_used_dataset_makes_room(tmp_path: Path, objects: Objects) -> None:
    cache = DatasetCache(tmp_path, bound_bytes=2 * len(ROWS))
    stored = [upload(objects, ROWS[:-1] + bytes([65 + number])) for number in range(3)]
    paths = [cache.fetch(objects, key=key, sha256=sha256) for key, sha256 in stored[:2]]
    cache.fetch(objects, key=stored[0][0], sha256=stored[0][1])
    paths.append(cache.fetch(objects, key=stored[2][0], sha256=stored[2][1]))

    assert [path.exists() for path in paths] == [True, False, True]


def test_a_snapshot_outlives_its_original(tmp_path: Path) -> None:
    original = tmp_path / "step-5"
    (original / "deep").mkdir(parents=True)
    (original / "deep" / "a.safetensors").write_bytes(b"weights")
    copy = snapshot(original, tmp_path / "copy")
    (original / "deep" / "a.safetensors").unlink()

    assert (copy / "deep" / "a.safetensors").read_bytes() == b"weights"
