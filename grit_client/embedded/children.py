"""A process of the service: started, watched, started again, ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from grit_client.embedded.identity import Identity

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
SETTLED_SECONDS = 30.0
"""After so long a life, the next restart is immediate again."""
MAX_LOG_BYTES = 10 * 1024**2
_GUARD = str(Path(__file__).with_name("guard.py"))


@dataclass(kw_only=True)
class Child:
    """One process that is to run for as long as the supervisor does."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    stage: int
    """Children of a lower stage are ended first."""
    grace_seconds: float = 10.0
    """Between being asked to end and being killed."""
    pass_fds: Sequence[int] = ()
    restarts: int = 0
    identity: Identity | None = field(default=None, init=False)
    last_exit: int | None = field(default=None, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _started_at: float = field(default=0.0, init=False)
    _start_again_at: float = field(default=0.0, init=False)
    _quick_deaths: int = field(default=0, init=False)

    def start(self) -> None:
        """Start it, in a session of its own, its output appended to its log."""
        _rotate(self.log)
        guarded = [sys.executable, "-I", "-S", _GUARD, str(os.getpid()), *self.argv]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - argv of our own making
                guarded,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                pass_fds=self.pass_fds,
                # Ctrl-C reaches the supervisor alone, which ends the children in their order.
                start_new_session=True,
            )
        self._started_at = time.monotonic()
        self.identity = Identity.of(self._process.pid)

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self._process is not None and self._process.poll() is None

    def revive(self) -> bool:
        """Start it again if it died and its time has come; tell whether anything changed."""
        if self.running:
            return False
        now = time.monotonic()
        if self._process is not None:  # it died since we looked last
            self.last_exit = self._process.returncode
            self._kill_group()
            self._process = self.identity = None
            settled = now - self._started_at > SETTLED_SECONDS
            self._quick_deaths = 0 if settled else self._quick_deaths + 1
            self._start_again_at = now + self._backoff()
            return True
        if now < self._start_again_at:
            return False
        self.restarts += 1
        self.start()
        return True

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
        if self._process is not None and self.running:
            self._process.send_signal(signal.SIGTERM)

    def wait_or_kill(self, deadline: float) -> None:
        """Wait until a time of the monotonic clock, then kill it; its group dies in any case."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._kill_group()
        self._process.wait()
        self._process = self.identity = None

    def _backoff(self) -> float:
        if self._quick_deaths == 0:
            return 0.0
        return min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** (self._quick_deaths - 1))

    def _kill_group(self) -> None:
        if self._process is None:
            return
        with suppress(ProcessLookupError, PermissionError):  # nobody is left in it
            os.killpg(self._process.pid, signal.SIGKILL)


def log_tail(log: Path, *, lines: int = 15) -> str:
    """The end of a log, for an error message."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def _rotate(log: Path) -> None:
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
