"""Whether the device of a worker can be trusted with a further job."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import structlog

from worker.failures import FailureCode

STRIKES: Final = 2
"""Attempts in a row that lost the device, after which no further one is started on it."""
_CHECK_SECONDS: Final = 120.0
_LOSSES: Final = {FailureCode.DEVICE_LOST, FailureCode.DEVICE_UNAVAILABLE}
_log = structlog.get_logger(__name__)


class DeviceHealth:
    """Counts the attempts that lost a device, and examines it before the next claim.

    A device in quarantine stays there until its worker is started anew: whoever does that has
    looked at it.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.quarantine: str | None = None
        """Why no job is claimed for the device, in words; none while it is."""
        self._strikes = 0

    def note(self, failure_code: str | None) -> None:
        """Take in how an attempt ended: the code of its failure, or none."""
        if failure_code not in _LOSSES:
            self._strikes = 0
            return
        self._strikes += 1
        if self._strikes >= STRIKES:
            self._close(f"{self._strikes} attempts in a row lost it ({failure_code})")

    def fit(self) -> bool:
        """Whether a job may be claimed; after an attempt that lost the device it is examined."""
        if self.quarantine is None and self._strikes > 0:
            fault = self._examine()
            if fault is not None:
                self._close(f"it failed its examination: {fault}")
        return self.quarantine is None

    def _examine(self) -> str | None:
        """Compute on the device in a process of its own, and return what is wrong with it."""
        command = [sys.executable, "-m", "worker.device_check", self.device]
        try:
            done = subprocess.run(  # noqa: S603 - our own module, argv list
                command, capture_output=True, text=True, check=False, timeout=_CHECK_SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"no answer in {_CHECK_SECONDS:g} s"
        if done.returncode == 0:
            return None
        return done.stdout.strip() or f"the process ended with {done.returncode}"

    def _close(self, reason: str) -> None:
        self.quarantine = (
            f"The device {self.device!r} takes no more jobs: {reason}. Look at it, then start the"
            " worker again."
        )
        _log.error("device_quarantined", device=self.device, reason=reason)
