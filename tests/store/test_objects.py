"""The object store's promises, in a folder and in S3."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from store import objects as objects_module
from store.errors import ObjectCorrupt, ObjectExists, ObjectMissing, StorageUnavailable
from store.manifests import MANIFEST_NAME, Manifest
from store.objects import Objects
from store.settings import Settings
from tests.ports import reserve_port


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    (made / "deep").mkdir(parents=True)
    (made / "manifest.json").write_bytes(b'{"own": true}')
    (made / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 10)
    (made / "deep" / "empty").write_bytes(b"")
    return made


def test_bytes_come_back_and_can_be_replaced_listed_and_deleted(objects: Objects) -> None:
    objects.put_bytes("a/x", b"one")
    objects.put_bytes("a/x", b"two!")
    objects.put_bytes("ab/y", b"")
    assert objects.get_bytes("a/x") == b"two!"
    assert objects.get_range("a/x", start=1, length=2) == b"wo"
    assert objects.get_range("a/x", start=3, length=99) == b"!"
    assert objects.get_range("a/x", start=9, length=1) == b""
    assert [(found.key, found.size_bytes) for found in objects.list("a/")] == [("a/x", 4)]
    assert sorted(found.key for found in objects.list()) == ["a/x", "ab/y"]
    objects.delete("a/x")
    objects.delete("a/x")
    assert not objects.exists("a/x")
    assert objects.exists("ab/y")
    objects.ping()


def test_a_missing_object_is_missing_in_every_way_of_reading(
    objects: Objects, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    for read in (
        lambda: objects.get_bytes("none"),
        lambda: objects.get_range("none", start=0, length=1),
        lambda: objects.get_to_file("none", target),
        lambda: objects.open_stream("none"),
        lambda: objects.size_bytes("none"),
        lambda: objects.read_manifest("none"),
        lambda: objects.get_folder("none", target),
    ):
        with pytest.raises(ObjectMissing, match="none"):
            read()
    assert not target.exists()


def test_one_of_many_writers_takes_a_free_key(objects: Objects) -> None:
    barrier = threading.Barrier(6)

    def write(number: int) -> bool:
        barrier.wait()
        return objects.put_if_absent("once", str(number).encode())

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(write, range(6)))
    assert won.count(True) == 1
    assert objects.get_bytes("once") == str(won.index(True)).encode()


def test_a_large_file_is_streamed_in_parts(objects: Objects, tmp_path: Path) -> None:
    source = tmp_path / "large"
    block = hashlib.sha256(b"x").digest() * 32_768
    with source.open("wb") as file:
        for _ in range(20):
            file.write(block)
        file.write(b"tail")
    objects.put_file("large", source)
    copy = tmp_path / "copy"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    objects.get_to_file("large", copy, sha256=digest)
    assert copy.read_bytes() == source.read_bytes()
    assert max(map(len, objects.open_stream("large"))) == objects_module.CHUNK_BYTES


def test_a_folder_comes_back_as_it_was(objects: Objects, folder: Path, tmp_path: Path) -> None:
    manifest = objects.put_folder("jobs/job_1/a1/step-2/", folder)
    copy = tmp_path / "copy"
    copy.mkdir()
    assert objects.get_folder("jobs/job_1/a1/step-2", copy) == manifest
    assert Manifest.of_folder(copy) == Manifest.of_folder(folder)
    assert (copy / "manifest.json").read_bytes() == b'{"own": true}'
    assert manifest.size_bytes == 2560 + 13
    with pytest.raises(ValueError, match="not empty"):
        objects.get_folder("jobs/job_1/a1/step-2", copy)


def test_a_folder_without_its_manifest_does_not_exist(
    objects: Objects, folder: Path, tmp_path: Path
) -> None:
    objects.put_folder("p", folder)
    objects.delete(f"p/{MANIFEST_NAME}")
    with pytest.raises(ObjectMissing):
        objects.get_folder("p", tmp_path / "copy")


def test_a_folder_with_a_link_is_not_stored_at_all(objects: Objects, folder: Path) -> None:
    (folder / "deep" / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="link"):
        objects.put_folder("p", folder)
    assert list(objects.list("p/")) == []


def test_a_part_that_cannot_be_written_leaves_no_manifest(tmp_path: Path, folder: Path) -> None:
    objects = Objects(Settings(home=tmp_path))
    objects.put_bytes("p/manifest.json/in-the-way", b"")
    with pytest.raises(StorageUnavailable):
        objects.put_folder("p", folder)
    assert objects.exists("p/adapter_model.safetensors")
    with pytest.raises(ObjectMissing):
        objects.read_manifest("p")


def test_a_folder_is_put_twice_but_not_over_another(
    objects: Objects, folder: Path, tmp_path: Path
) -> None:
    first = objects.put_folder("p", folder)
    assert objects.put_folder("p", folder) == first
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ObjectExists):
        objects.put_folder("p", other)
    assert objects.read_manifest("p") == first


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="truncated"),
        pytest.param(lambda data: data + b"x", id="longer"),
        pytest.param(lambda data: bytes([data[0] ^ 1]) + data[1:], id="one bit"),
        pytest.param(lambda _: b"", id="empty"),
    ],
)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "manifest.json", MANIFEST_NAME])
def test_every_damage_is_found(
    objects: Objects,
    folder: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[bytes], bytes],
) -> None:
    objects.put_folder("p", folder)
    objects.put_bytes(f"p/{name}", damage(objects.get_bytes(f"p/{name}")))
    with pytest.raises(ObjectCorrupt):
        objects.get_folder("p", tmp_path / "copy")
    assert list(tmp_path.glob("*copy*")) == []


def test_a_file_of_another_hash_does_not_appear(objects: Objects, tmp_path: Path) -> None:
    objects.put_bytes("x", b"data")
    with pytest.raises(ObjectCorrupt):
        objects.get_to_file("x", tmp_path / "x", sha256="0" * 64)
    assert not (tmp_path / "x").exists()


def test_deleting_a_prefix_leaves_its_neighbours(objects: Objects, folder: Path) -> None:
    objects.put_folder("jobs/job_1", folder)
    objects.put_bytes("jobs/job_10/x", b"")
    assert objects.delete_prefix("jobs/job_1/") == 4
    assert [found.key for found in objects.list()] == ["jobs/job_10/x"]
    assert objects.delete_prefix("jobs/job_1/") == 0
    with pytest.raises(ValueError, match="whole store"):
        objects.delete_prefix("/")


@pytest.mark.parametrize(
    "key", ["", "/x", "a//b", "../x", "a/../b", "a/.", "a\0b", "a b", "é", "a/"]
)
def test_a_key_that_could_name_something_else_is_refused(objects: Objects, key: str) -> None:
    with pytest.raises(ValueError, match="cannot be the key"):
        objects.put_bytes(key, b"")


def test_a_store_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path,
        objects_url="s3://bucket",
        s3_endpoint=f"http://127.0.0.1:{reserve_port()}",
        s3_access_key_id="a",
        s3_secret_access_key="b",
        objects_retry_seconds=0.2,
    )
    with pytest.raises(StorageUnavailable):
        Objects(settings).ping()


def test_a_wrong_secret_is_refused_by_the_server(production_settings: Settings) -> None:
    wrong = production_settings.model_copy(
        update={"s3_secret_access_key": type(production_settings.s3_secret_access_key)("wrong")}
    )
    with pytest.raises(StorageUnavailable):
        Objects(wrong).put_bytes("x", b"")


@pytest.mark.parametrize("url", ["ftp://x/y", "file://host/x", "s3:///x", "/folder"])
def test_an_unknown_kind_of_store_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="GRIT_OBJECTS_URL must be"):
        Settings(home=tmp_path, objects_url=url)
