"""The disk cache of adapters: verified, kept while held, the least recently used gone first."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.errors import ObjectMissing
from store.objects import Objects
from store.settings import Settings
from worker.adapter_cache import AdapterCache

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def stored(tmp_path: Path) -> Objects:
    """Three adapters."""
    objects = Objects(Settings(home=tmp_path / "service"))
    folder = tmp_path / "one"
    folder.mkdir()
    for number in range(3):
        (folder / WEIGHTS).write_text(f"weights {number}")
        (folder / "adapter_config.json").write_text("{}")
        objects.put_folder(f"adapters/adp_{number}", folder)
    return objects


@pytest.fixture
def cache(tmp_path: Path, stored: Objects) -> Iterator[AdapterCache]:
    made = AdapterCache(tmp_path / "home", stored, max_adapters=2)
    yield made
    made.close()


def hold(cache: AdapterCache, number: int = 0) -> tuple[str, str]:
    """Use an adapter for a moment; return its id and its weights."""
    with cache.hold(f"adp_{number}", prefix=f"adapters/adp_{number}") as held:
        return held.id, (held.folder / WEIGHTS).read_text()


def kept(cache: AdapterCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.is_dir())


def test_an_adapter_comes_once_and_is_named_by_its_content(
    cache: AdapterCache, stored: Objects
) -> None:
    name, weights = hold(cache)
    assert weights == "weights 0"
    assert name == f"adp_0-{stored.read_manifest('adapters/adp_0').sha256[:12]}"
    stored.delete_prefix("adapters/adp_0")
    assert hold(cache) == (name, weights)


def test_the_adapters_asked_for_last_are_kept(cache: AdapterCache) -> None:
    for number in (0, 1, 0, 2):
        hold(cache, number)
        time.sleep(0.02)
    assert kept(cache) == ["adp_0", "adp_2"]


def test_an_adapter_in_use_stays_whatever_else_comes(cache: AdapterCache) -> None:
    with cache.hold("adp_0", prefix="adapters/adp_0") as held:
        time.sleep(0.02)
        hold(cache, 1)
        time.sleep(0.02)
        hold(cache, 2)
        assert (held.folder / WEIGHTS).read_text() == "weights 0"
        assert "adp_0" in kept(cache)
    assert len(kept(cache)) == 2


@pytest.mark.parametrize("damage", ["same size", "shorter", "gone", "one more", "no record"])
def test_files_that_changed_on_disk_come_anew(cache: AdapterCache, damage: str) -> None:
    first = hold(cache)
    weights = cache.folder / "adp_0" / WEIGHTS
    if damage == "same size":
        weights.write_text("WEIGHTS 0")
    elif damage == "shorter":
        weights.write_text("")
    elif damage == "gone":
        weights.unlink()
    elif damage == "one more":
        weights.with_name("adapter_model.bin").write_text("?")
    else:
        (cache.folder / "adp_0.json").write_text("?")
        weights.write_text("other")
    assert hold(cache) == first
    assert sorted(path.name for path in weights.parent.iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
    ]


def test_files_that_were_only_touched_are_hashed_and_kept(
    cache: AdapterCache, stored: Objects
) -> None:
    first = hold(cache)
    os.utime(cache.folder / "adp_0" / WEIGHTS, (1, 1))
    stored.delete_prefix("adapters/adp_0")
    assert hold(cache) == first


def test_an_adapter_that_cannot_come_leaves_nothing_behind(cache: AdapterCache) -> None:
    with pytest.raises(ObjectMissing):
        hold(cache, 7)
    assert kept(cache) == []
    assert hold(cache)[1] == "weights 0"


def test_a_restarted_worker_finds_its_adapters_and_no_rubbish(
    tmp_path: Path, stored: Objects
) -> None:
    before = AdapterCache(tmp_path / "home", stored, max_adapters=2)
    first = hold(before)
    shutil.copytree(before.folder / "adp_0", before.folder / ".adp_1.0")
    before.close()
    stored.delete_prefix("adapters/adp_0")
    after = AdapterCache(tmp_path / "home", stored, max_adapters=2)
    assert kept(after) == ["adp_0"]
    assert hold(after) == first
    after.close()


def test_two_workers_of_a_home_do_not_share_a_folder(cache: AdapterCache, stored: Objects) -> None:
    other = AdapterCache(cache.folder.parents[2], stored, max_adapters=2)
    assert other.folder != cache.folder
    assert other.folder.parent == cache.folder.parent
    other.close()


def test_many_threads_that_want_one_adapter_download_it_once(cache: AdapterCache) -> None:
    inodes: list[int] = []

    def use() -> None:
        with cache.hold("adp_0", prefix="adapters/adp_0") as held:
            inodes.append((held.folder / WEIGHTS).stat().st_ino)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inodes) == 8
    assert len(set(inodes)) == 1
