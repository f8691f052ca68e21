"""Whether the device of a worker can be trusted with a further job."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum, auto
from typing import Final

import structlog

from worker.device_check import EXIT_FIT, EXIT_NO_MEMORY
from worker.failures import FailureCode

STRIKES: Final = 2
"""Different jobs in a row that lost the device, after which no further one is started on it."""
_CHECK_SECONDS: Final = 120.0
_LOSSES: Final = {FailureCode.DEVICE_LOST, FailureCode.DEVICE_UNAVAILABLE}
_log = structlog.get_logger(__name__)


class _Examination(Enum):
    PASSED = auto()
    FAILED = auto()
    UNDECIDED = auto()
    """Other processes hold the memory that it takes."""


class DeviceHealth:
    """Counts the jobs that lost a device, and examines it before the next claim.

    A loss may be the job's own doing, so a job counts once however often it is tried, and an
    examination that the device passes clears the count. A device in quarantine stays there until
    its worker is restarted.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.quarantine: str | None = None
        """Why no job is claimed for the device, in words; none while it is."""
        self._lost_by: set[str] = set()
        """The jobs that lost it since one did not, or since it passed an examination."""

    def note(self, failure_code: str | None, *, job_id: str) -> None:
        """Record how an attempt of a job ended: the code of its failure, or none."""
        if failure_code not in _LOSSES:
            self._lost_by.clear()
            return
        self._lost_by.add(job_id)
        if len(self._lost_by) >= STRIKES:
            self._close(f"{len(self._lost_by)} jobs in a row lost it ({failure_code})")

    def fit(self) -> bool:
        """Whether a job may be claimed; after a job that lost the device it is examined."""
        if self.quarantine is None and self._lost_by:
            found, said = self._examine()
            _log.info("device_examined", device=self.device, found=found.name.lower(), said=said)
            if found is _Examination.PASSED:
                self._lost_by.clear()
            elif found is _Examination.FAILED:
                self._close(f"it failed its examination: {said}")
        return self.quarantine is None

    def _examine(self) -> tuple[_Examination, str]:
        """Compute on the device in a process of its own; return what was found, and its words."""
        command = [sys.executable, "-m", "worker.device_check", self.device]
        try:
            done = subprocess.run(  # noqa: S603 - our own module, argv list
                command, capture_output=True, text=True, check=False, timeout=_CHECK_SECONDS
            )
        except subprocess.TimeoutExpired:
            return _Examination.FAILED, f"no answer in {_CHECK_SECONDS:g} s"
        said = done.stdout.strip()
        if done.returncode == EXIT_FIT:
            return _Examination.PASSED, said
        if done.returncode == EXIT_NO_MEMORY:
            return _Examination.UNDECIDED, said
        return _Examination.FAILED, said or f"the process ended with {done.returncode}"

    def _close(self, reason: str) -> None:
        self.quarantine = (
            f"The device {self.device!r} takes no more jobs: {reason}. Check it, then restart the"
            " worker."
        )
        _log.error("device_quarantined", device=self.device, reason=reason)
