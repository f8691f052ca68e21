"""What the command line does with a home's service: start it, end it, look at it."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from grit_client.embedded.children import log_tail
from grit_client.embedded.identity import POLL_SECONDS
from grit_client.embedded.record import Record
from grit_client.embedded.supervisor import Options, Say, Supervisor, sweep
from grit_client.errors import EmbeddedError
from grit_client.home import Home

START_SECONDS = 300.0
STOP_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Running:
    """A service that runs."""

    url: str
    key_file: str
    already: bool
    """It ran before we came."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"url": self.url, "key_file": self.key_file, "already_running": self.already}


def running(home: Home) -> Record | None:
    """The record of a home's service, if it runs."""
    record = Record.read(home)
    return record if record is not None and record.alive else None


def run_here(home: Home, options: Options, *, say: Say, on_ready: Say | None = None) -> None:
    """Be the supervisor, until a signal."""
    Supervisor(home, options, say=say, on_ready=on_ready).run()


def start_detached(home: Home, options: Options) -> Running:
    """Start the service in the background and wait until it is ready; leave a running one alone."""
    if _settled_record(home) is not None and running(home) is not None:
        return _wait_until_ready(home, None)
    home.prepare()
    with (home.logs / "supervisor.log").open("ab") as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", "-m", "grit_client.embedded", str(home.folder)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # By the pipe and not as arguments: a broker's URL may hold a password.
    if process.stdin is not None:
        with process.stdin as pipe:
            pipe.write(json.dumps(asdict(options)).encode())
    return _wait_until_ready(home, process)


def stop(home: Home) -> list[str]:
    """End the service and everything it started; name what was ended. Nothing is also fine.

    Raises:
        EmbeddedError: Something is still there.
    """
    record = _settled_record(home)
    if record is None:
        return []
    ended = [name for name, item in record.processes.items() if item.alive()]
    if record.supervisor is not None and record.supervisor.alive():
        ended.append("supervisor")
        record.supervisor.send(signal.SIGTERM)
        if not record.supervisor.wait_until_gone(STOP_SECONDS):
            record.supervisor.send(signal.SIGKILL)
            record.supervisor.wait_until_gone(5.0)
    # What it wrote last is what it may have left.
    for left in (record, Record.read(home)):
        sweep(left)
    still = [name for name, item in record.processes.items() if item.alive()]
    if still:
        raise EmbeddedError(f"These processes could not be ended: {', '.join(still)}.")
    home.state_file.unlink(missing_ok=True)
    return ended


def _wait_until_ready(home: Home, process: subprocess.Popen[bytes] | None) -> Running:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        record = Record.read(home)
        ours = record if record is not None and _is(record, process) else None
        if ours is not None and ours.phase == "ready" and ours.url is not None:
            return Running(url=ours.url, key_file=str(home.key_file), already=process is None)
        if process is None and running(home) is None:
            raise EmbeddedError("The service that was starting or running has ended meanwhile.")
        if process is not None and process.poll() is not None:
            if ours is not None and ours.error:
                raise EmbeddedError(ours.error)
            if running(home) is None:
                tail = log_tail(home.logs / "supervisor.log")
                raise EmbeddedError(f"The service did not start:\n{tail}")
            process = None  # somebody else's start was faster: theirs is the one
        time.sleep(POLL_SECONDS)
    raise EmbeddedError(
        f"The service is not ready after {START_SECONDS:g} s; see {home.logs}, or end it with"
        " `grit down`."
    )


def _is(record: Record, process: subprocess.Popen[bytes] | None) -> bool:
    if process is None:
        return record.alive
    return record.supervisor is not None and record.supervisor.pid == process.pid


def _settled_record(home: Home) -> Record | None:
    # A supervisor that holds the lock writes its record within moments.
    for _ in range(round(5.0 / POLL_SECONDS)):
        record = Record.read(home)
        if (record is not None and record.alive) or not _locked(home):
            return record
        time.sleep(POLL_SECONDS)
    raise EmbeddedError(f"A process holds {home.lock_file} but has written no record.")


def _locked(home: Home) -> bool:
    try:
        with home.lock_file.open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    except OSError as error:  # such as the home of another user
        raise EmbeddedError(f"{home.lock_file} cannot be read: {error.strerror}.") from None
    return False
