"""One training worker for each device."""

import subprocess
import sys
from pathlib import Path

import pytest

from worker.device_lock import DeviceLock, DeviceTaken, device_name


def test_a_second_worker_is_refused_with_the_holder_and_the_remedy(tmp_path: Path) -> None:
    first = DeviceLock(tmp_path, "cpu")
    first.acquire(wait_seconds=0)

    with pytest.raises(DeviceTaken, match=r"process \d+.*'cpu'.*another GRIT_HOME"):
        DeviceLock(tmp_path, "cpu").acquire(wait_seconds=0.1)
    first.release()
    second = DeviceLock(tmp_path, "cpu")
    second.acquire(wait_seconds=0)
    second.release()


def test_devices_do_not_share_a_lock(tmp_path: Path) -> None:
    locks = [DeviceLock(tmp_path, device) for device in ("cpu", "cuda")]
    for lock in locks:
        lock.acquire(wait_seconds=0)

    assert len({lock.fd for lock in locks}) == 2
    for lock in locks:
        lock.release()


def test_a_child_that_holds_the_descriptor_keeps_the_device(tmp_path: Path) -> None:
    lock = DeviceLock(tmp_path, "cpu")
    lock.acquire(wait_seconds=0)
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fd,)
    )
    lock.release()

    with pytest.raises(DeviceTaken):
        DeviceLock(tmp_path, "cpu").acquire(wait_seconds=0.2)
    child.communicate(b"\n")
    after = DeviceLock(tmp_path, "cpu")
    after.acquire(wait_seconds=2)
    after.release()


def test_cards_of_a_machine_do_not_share_a_lock_and_one_card_has_one() -> None:
    names = [
        device_name("cuda", {"CUDA_VISIBLE_DEVICES": visible})
        for visible in ("1", "GPU-8a1b/0", "2,3", "")
    ]
    assert names == ["cuda-1", "cuda-GPU-8a1b-0", "cuda-2", "cuda-0"]
    # Without the variable a worker trains on the first card.
    assert device_name("cuda", {}) == device_name("cuda", {"CUDA_VISIBLE_DEVICES": "0"})
    assert device_name("cuda", {"HIP_VISIBLE_DEVICES": "4"}) == "cuda-4"
    assert device_name("cpu", {"CUDA_VISIBLE_DEVICES": "1"}) == "cpu"
