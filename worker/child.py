"""The worker's end of a training process: start it, hand it a job, read its events, end it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import structlog

from grit_core.events import event_from_json
from store.redaction import password_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from grit_core.events import TrainingEvent

LOG_NAME = "attempt.log"
_SECRET_PREFIXES = ("GRIT_", "AWS_", "CELERY_", "PG")
_SECRET_WORDS = {"SECRET", "PASSWORD", "PASSWD", "TOKEN", "CREDENTIALS", "KEY", "DSN"}
_NEEDED = {"HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
"""What it takes to fetch a base model from the hub."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exited:
    """The training process has ended and all its events were read."""

    returncode: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """The training process works, and has nothing to tell."""


class Child:
    """One training process, from its start to its end.

    Start it from a thread that lives as long as the worker: the kernel kills it when the thread
    that started it dies.
    """

    def __init__(self, folder: Path, *, keep_fds: Sequence[int] = ()) -> None:
        """Start the process.

        Args:
            folder: Its own folder, which receives its log and becomes the attempt's scratch folder.
            keep_fds: Descriptors that it holds too, such as the lock of the device.
        """
        self.folder = folder
        self.inbox: queue.SimpleQueue[TrainingEvent | Beat | Exited] = queue.SimpleQueue()
        """Its events and beats in order, then `Exited`."""
        self._ready = threading.Event()
        self._ended = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        read_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", "worker.attempt", f"--events-fd={write_fd}"]
        command.append(f"--parent-pid={os.getpid()}")
        try:
            with (folder / LOG_NAME).open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603 - our own module, argv list
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_fd, *keep_fds),
                    env=environment_without_secrets(),
                    process_group=0,
                )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self._events = os.fdopen(read_fd, "r", encoding="utf-8")
        self._reader = threading.Thread(target=self._read, name=f"child-{self.pid}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return not self._ended.is_set()

    def wait_ready(self, timeout_seconds: float) -> bool:
        """Wait until it has imported everything; False when it died or took too long."""
        deadline = time.monotonic() + timeout_seconds
        while not self._ready.wait(timeout=0.05):
            if self._ended.is_set() or time.monotonic() >= deadline:
                return False
        return True

    def begin(self, order: Mapping[str, Any]) -> None:
        """Hand it its order (`worker.attempt`), now or as soon as it is ready.

        From a thread of its own: a process that does not read must not hold up its supervision.
        """
        self._order_line(json.dumps(order).encode() + b"\n")

    def _order_line(self, line: bytes) -> None:
        threading.Thread(
            target=self._order, args=(line,), name=f"order-{self.pid}", daemon=True
        ).start()

    def ask_to_stop(self) -> None:
        """Have it save a checkpoint at its next step and leave."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and whatever it started, now. Any thread may call this."""
        self._signal(signal.SIGKILL)

    def dismiss(self) -> None:
        """End it and forget it."""
        self.kill()
        self._process.wait()
        self._reader.join(timeout=5)
        with contextlib.suppress(OSError):  # an order that nobody has read
            _stream(self._process.stdin).close()

    def _order(self, line: bytes) -> None:
        stdin = _stream(self._process.stdin)
        with contextlib.suppress(OSError, ValueError):  # it is dead, which its exit tells
            stdin.write(line)
            stdin.flush()

    def _signal(self, number: int) -> None:
        if self._process.poll() is not None:
            return
        try:
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                os.kill(self._process.pid, number)
        except ProcessLookupError:
            return

    def _read(self) -> None:
        with self._events:
            for line in self._events:
                self._take(line)
        returncode = self._process.wait()
        self._ended.set()
        self.inbox.put(Exited(returncode=returncode))

    def _take(self, line: str) -> None:
        try:
            document: dict[str, Any] = json.loads(line)
            if document.get("ready"):
                self._ready.set()
                _log.info("child_ready", child=self.pid, import_seconds=document["import_seconds"])
                return
            self.inbox.put(Beat() if document.get("beat") else event_from_json(document))
        except (ValueError, KeyError, TypeError):  # a line torn by a kill
            _log.warning("unreadable_event", line=line[:200], child=self.pid)


def environment_without_secrets() -> dict[str, str]:
    """Return the environment without the deployment's keys: a child needs none."""
    return {
        name: value
        for name, value in os.environ.items()  # noqa: TID251 - passed on to a child, not read as configuration
        if name.upper() in _NEEDED or not _is_secret(name, value)
    }


def _is_secret(name: str, value: str) -> bool:
    words = set(name.upper().split("_"))
    return (
        name.startswith(_SECRET_PREFIXES)
        or not _SECRET_WORDS.isdisjoint(words)
        or password_of(value) is not None
        # A raw `/` or `#` in the password hides it from a parser of URLs, and from that one only.
        or re.search(r"://\S*:\S*@", value) is not None
    )


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:  # Popen was asked for a pipe
        raise RuntimeError("The training process has no standard input.")
    return stream
