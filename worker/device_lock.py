"""One training worker for each device: a file lock that the kernel releases with its holders."""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class DeviceTaken(Exception):
    """Another training worker of this home folder holds the device."""


class DeviceLock:
    """The exclusive right to train on one device.

    The training processes inherit the descriptor, so a device counts as taken until the last of a
    dead worker's processes is gone too.
    """

    def __init__(self, folder: Path, device: str) -> None:
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + wait_seconds
        while not _locked(fd):
            if time.monotonic() >= deadline:
                holder = os.pread(fd, 64, 0).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise DeviceTaken(
                    f"Another training worker (process {holder}) already serves the device"
                    f" {self.device!r} of this home folder ({self.path}). Stop it first, or give"
                    " this one another device or another GRIT_HOME."
                )
            time.sleep(0.1)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
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
