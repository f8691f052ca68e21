"""One training worker for each device: a file lock that the kernel releases with its holders.

Each card of several is a device of its own, so that their workers may share a home folder.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from typing import TYPE_CHECKING

from store.folders import make_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_CARDS = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


class DeviceTaken(Exception):
    """Another training worker of this home folder holds the device."""


def device_name(device: str, environment: Mapping[str, str] | None = None) -> str:
    """Return what tells a worker's device from others of this machine: `cpu`, or `cuda-1`.

    Args:
        device: `cuda`, `mps` or `cpu`.
        environment: Of the worker; by default this process's own. It names the cards that the
            worker sees, of which it trains on the first.
    """
    if device != "cuda":
        return device
    # Set by whoever starts the worker and read by CUDA: no setting of ours.
    own = os.environ if environment is None else environment  # noqa: TID251
    visible = next((own[name] for name in _CARDS if own.get(name)), "0")
    card = re.sub(r"[^A-Za-z0-9-]", "-", visible.split(",")[0].strip())
    return f"{device}-{card}"


class DeviceLock:
    """The exclusive right to train on one device.

    The training processes inherit the descriptor, so a device counts as taken until the last of a
    dead worker's processes is gone too.
    """

    def __init__(self, folder: Path, device: str) -> None:
        """Prepare the lock of a device, by its `device_name`."""
        self.device = device
        self.path = folder / f"train-{device}.lock"
        self._fd: int | None = None

    @property
    def fd(self) -> int:
        """The locked descriptor.

        Raises:
            DeviceTaken: The lock is not held.
        """
        if self._fd is None:
            raise DeviceTaken(f"The lock {self.path} is not held.")
        return self._fd

    def acquire(self, *, wait_seconds: float) -> None:
        """Take the lock, waiting for the processes of a worker that has just died.

        Raises:
            DeviceTaken: A living worker holds it; the message names its process and the remedy.
        """
        make_folder(self.path.parent, what="the folder of locks", setting="GRIT_HOME")
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + wait_seconds
        while not _locked(fd):
            if time.monotonic() >= deadline:
                holder = os.pread(fd, 128, 0).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise DeviceTaken(
                    f"Another training worker (process {holder}) already serves the device"
                    f" {self.device!r} of this home folder ({self.path}). Stop it first, or give"
                    " this one another device, another card (CUDA_VISIBLE_DEVICES) or another"
                    " GRIT_HOME."
                )
            time.sleep(0.1)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Give the device back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
