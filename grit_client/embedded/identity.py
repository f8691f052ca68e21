"""Who a process is: its id and its start time, since ids are used again.

A pid file that outlived its process may name somebody else's process by now; nothing is signalled
unless the start time agrees too.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, told from every other one that this machine runs or ran."""

    pid: int
    started: str
    """Opaque: what the operating system says about its start."""

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The identity of a running process; None when there is none (a zombie is none)."""
        started = _start_time(pid)
        return None if started is None else cls(pid=pid, started=started)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Self | None:
        """Read what `to_json` wrote; None when it is no identity."""
        if not isinstance(data, Mapping):
            return None
        pid, started = data.get("pid"), data.get("started")
        if isinstance(pid, int) and pid > 1 and isinstance(started, str):
            return cls(pid=pid, started=started)
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"pid": self.pid, "started": self.started}

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return _start_time(self.pid) == self.started

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """Signal it, or the process group that it leads, if it is still this process."""
        if not self.alive():
            return
        try:
            if group and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def wait_until_gone(self, timeout_seconds: float) -> bool:
        """Wait for its end; tell whether it came."""
        deadline = time.monotonic() + timeout_seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def end(self, *, grace_seconds: float) -> None:
        """Ask it to end, and kill it with its group when it does not."""
        self.send(signal.SIGTERM)
        if not self.wait_until_gone(grace_seconds):
            self.send(signal.SIGKILL, group=True)
            self.wait_until_gone(5.0)


def _start_time(pid: int) -> str | None:
    on_linux = Path("/proc/self/stat").exists()
    return _start_time_linux(pid) if on_linux else _start_time_elsewhere(pid)


def _start_time_elsewhere(pid: int) -> str | None:
    answer = subprocess.run(  # noqa: S603 - a fixed program and a number
        ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    state, _, started = answer.partition(" ")
    return started.strip() or None if not state.startswith("Z") else None


def _start_time_linux(pid: int) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may hold anything; what follows the last one is numbers.
    fields = text.rpartition(")")[2].split()
    state, started = fields[0], fields[19]
    return None if state in "ZX" else started
