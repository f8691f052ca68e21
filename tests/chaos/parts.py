"""Parts of a deployment that are killed and started again: servers, and processes of our own."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import psutil

from tests.services import end_with_parent


class Server:
    """PostgreSQL, Valkey or the object store: it vanishes and comes back with its data."""

    def __init__(self, name: str, start: Callable[[], AbstractContextManager[object]]) -> None:
        self.name = name
        self._start = start
        self._running: ExitStack | None = None

    def start(self) -> None:
        """Start it, and wait until it answers. Always in one thread: it ends with that thread."""
        if self._running is None:
            self._running = ExitStack()
            self._running.enter_context(self._start())

    def vanish(self) -> None:
        """End it without a farewell."""
        if self._running is not None:
            self._running.close()
            self._running = None


class Process:
    """A process of the service, started again by the same command."""

    def __init__(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self._command = list(command)
        self._environment = dict(environment)
        self._log = log
        self._running: subprocess.Popen[bytes] | None = None
        self.frozen = False
        self.crashes: list[int] = []
        """Exit statuses of ends that were its own fault."""

    @property
    def pid(self) -> int:
        """Its process id.

        Raises:
            RuntimeError: It was never started.
        """
        if self._running is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._running.pid

    @property
    def alive(self) -> bool:
        """Whether it runs, frozen or not."""
        return self._running is not None and self._running.poll() is None

    def start(self) -> None:
        """Start it unless it runs."""
        if self.alive:
            return
        self._note_crash()
        with self._log.open("ab") as file:
            self._running = subprocess.Popen(
                self._command,
                cwd=Path(__file__).parents[2],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - it allocates nothing
            )
        self.frozen = False

    def kill(self) -> None:
        """End it at once, wherever it is."""
        self._signal(signal.SIGKILL)
        if self._running is not None:
            self._running.wait()

    def freeze(self) -> None:
        """Stop it in the middle of whatever it does."""
        self._signal(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)
        self.frozen = False

    def ask_to_stop(self) -> None:
        """Tell it to finish what it does, as a deployment would."""
        self._signal(signal.SIGTERM)

    def stop(self, *, patience_seconds: float = 20.0) -> None:
        """End it in good order, or after a while in any case."""
        if self.frozen:
            self.thaw()
        self.ask_to_stop()
        deadline = time.monotonic() + patience_seconds
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        self._note_crash()
        self.kill()

    def children(self) -> list[psutil.Process]:
        """Its own processes, the oldest first."""
        try:
            found = psutil.Process(self.pid).children()
            return sorted(found, key=lambda child: float(child.create_time()))
        except psutil.NoSuchProcess:
            return []

    def text(self) -> str:
        """What it wrote to its log so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _note_crash(self) -> None:
        status = None if self._running is None else self._running.poll()
        if status is not None and status > 0:
            self.crashes.append(status)

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            os.kill(self.pid, number)
