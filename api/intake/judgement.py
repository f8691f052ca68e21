"""Have an upload judged by a process of its own, which may take so much and no more.

Whatever a file does to that process (it crashes, hangs, eats memory), the service answers that the
file is not taken, and why, and goes on.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any, Final

import structlog
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

import api.intake
from api.errors import Problem
from api.intake.adapter_files import AdapterOrder, AdapterVerdict
from api.intake.canonical import Intake
from api.intake.judge import EXIT_NO_SPACE, TRACE_NAME, DatasetOrder, Limits
from grit_core.records import RowFault
from store.settings import Settings

log = structlog.get_logger(__name__)

_limiter: RunVar[CapacityLimiter] = RunVar("grit_intake_limiter")
_MAX_VERDICT_BYTES: Final = 64 * 1024**2
_MIB: Final = 1024**2
_ENVIRONMENT: Final = {
    "PATH": os.defpath,
    "LANG": "C.UTF-8",
    "PYTHONPATH": str(Path(api.intake.__path__[0]).parents[1]),
    # Each would reserve address space for every core of the machine.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All that the judge knows of the deployment."""


def intake_limiter(settings: Settings) -> CapacityLimiter:
    """Return the threads of this event loop that may have uploads judged."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = CapacityLimiter(settings.intake_processes)
        _limiter.set(limiter)
        return limiter


def judged_dataset(settings: Settings, order: DatasetOrder, *, scratch: Path) -> Intake:
    """Have a dataset checked row by row and written in canonical form.

    Args:
        settings: The bounds.
        order: What is to be judged.
        scratch: A folder for the judge's files.

    A file that cannot be judged is a `Problem` (`dataset_invalid`).
    """
    size = Path(order.file).stat().st_size
    judge = _Judge(settings, num_bytes=size, scratch=scratch, code="dataset_invalid")
    taken = judge.ask({"dataset": asdict(order)})
    return Intake(**{**taken, "faults": [RowFault(**fault) for fault in taken["faults"]]})


def judged_adapter(settings: Settings, order: AdapterOrder, *, scratch: Path) -> AdapterVerdict:
    """Have an adapter looked through and written anew; as `judged_dataset`."""
    size = sum(Path(path).stat().st_size for _, path in order.files)
    judge = _Judge(settings, num_bytes=size, scratch=scratch, code="adapter_invalid")
    return AdapterVerdict(**judge.ask({"adapter": asdict(order)}))


class _Judge:
    """One process for one upload."""

    def __init__(self, settings: Settings, *, num_bytes: int, scratch: Path, code: str) -> None:
        self._scratch, self._code = scratch, code
        self._limits = Limits(
            memory_bytes=settings.intake_memory_bytes,
            processor_seconds=ceil(settings.intake_seconds + 2 * num_bytes / _MIB),
        )

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the upload comes to.

        Raises:
            Problem: It is refused, or the judge did not survive it.
        """
        path = self._scratch / "verdict.json"
        returncode = self._run({
            **order,
            "limits": asdict(self._limits),
            "scratch": str(self._scratch),
            "verdict": str(path),
        })
        if returncode == EXIT_NO_SPACE:
            raise self._failed("disk")
        if returncode != 0:
            raise self._lost(returncode)
        with path.open("rb") as file:
            verdict = json.loads(file.read(_MAX_VERDICT_BYTES))
        if "refused" in verdict:
            raise Problem(*verdict["refused"])
        if "failed" in verdict:
            raise self._failed(verdict["failed"])
        return dict(verdict["taken"])

    def _run(self, order: Mapping[str, Any]) -> int:
        """Start the process, hand it its order, and wait for its end.

        From the thread that waits, since the kernel takes that for the parent.
        """
        command = [sys.executable, "-P", "-s", "-m", "api.intake.judge"]
        with subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [*command, f"--parent-pid={os.getpid()}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            cwd=self._scratch,
            start_new_session=True,  # a terminal's Ctrl-C is the service's to answer
        ) as process:
            try:
                # Twice the processor's time: a machine may be busy, a file may wait for nothing.
                process.communicate(
                    json.dumps(order).encode() + b"\n", timeout=2 * self._limits.processor_seconds
                )
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return -signal.SIGXCPU
            except BaseException:
                process.kill()
                raise
            return process.returncode

    def _lost(self, returncode: int) -> Problem:
        """Return the problem of a file that ended its judge."""
        trace = self._scratch / TRACE_NAME
        stack = trace.read_text("utf-8", "replace")[-4000:] if trace.exists() else ""
        log.error("upload_judge_lost", returncode=returncode, stack=stack)
        if returncode in {-signal.SIGXCPU, -signal.SIGKILL}:
            seconds = self._limits.processor_seconds
            detail = f"Judging the file takes more than {seconds} seconds; split it."
        else:
            detail = (
                "The file ended the process that read it: it is broken, or made to do harm. See"
                " whether its archive and its images open elsewhere, and write them again."
            )
        return Problem(self._code, detail)

    def _failed(self, reason: str) -> Problem:
        """Return the problem of a file at which its judge gave up."""
        if reason == "disk":
            return Problem("storage_full", "No space is left to unpack the file; try again later.")
        if reason == "size":
            return Problem("archive_limits", "The file unpacks to more than a file may have.")
        if reason == "memory":
            bound = self._limits.memory_bytes // _MIB
            detail = f"Judging the file takes more than {bound} MiB of memory; split its rows."
            log.warning("upload_judge_out_of_memory", bound_mib=bound)
            return Problem(self._code, detail)
        log.error("upload_judge_failed", stack=reason[-4000:])
        detail = "The file could not be read for a reason that is ours; it is logged."
        return Problem(self._code, detail)
