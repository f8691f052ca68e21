"""The process that stays: starts the service in order, watches it, ends it in order.

Order: broker, migrations, API, workers; the end is the reverse, and workers get time to save a
checkpoint. A child that dies is started again, at once when it had run well, else after a growing
pause. Children die with the supervisor (`guard`), whatever kills it.
"""

import fcntl
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING

from grit_client.embedded.broker import Broker, prepare_broker
from grit_client.embedded.children import Child, log_tail
from grit_client.embedded.devices import CPU, Device, DeviceProbe
from grit_client.embedded.environment import child_environment, worker_environment
from grit_client.embedded.identity import Identity
from grit_client.embedded.ports import LOOPBACK, listen
from grit_client.embedded.record import Phase, Record
from grit_client.errors import EmbeddedError
from grit_client.home import Home

if TYPE_CHECKING:
    import socket

BROKER_SECONDS = 10.0
MIGRATE_SECONDS = 120.0
READY_SECONDS = 120.0
WATCH_SECONDS = 0.25
WORKERS, API, BROKER = 0, 1, 2  # stages: the first is ended first
DEFAULT_MAX_BATCH = 16
_DRAIN_MARGIN_SECONDS = 10.0

Say = Callable[[str], None]


class Stopped(Exception):
    """Asked to stop while still starting."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller of `grit up` may choose."""

    port: int | None = None
    """None: the first free one from 8000."""
    broker_url: str | None = None
    """None: start a broker of our own."""


class Supervisor:
    """Runs one home's service.

    Args:
        home: Where it lives.
        options: The caller's choices.
        say: Called with one line for every step, for a person to read.
        on_ready: Called with the address once the service answers.
    """

    def __init__(
        self, home: Home, options: Options, *, say: Say, on_ready: Say | None = None
    ) -> None:
        self._home = home
        self._options = options
        self._say = say
        self._on_ready = on_ready or (lambda url: say(f"ready: {url}"))
        self._children: list[Child] = []
        self._stop = threading.Event()
        self._hurry = False
        self._record = Record(supervisor=None, phase="starting")
        self._listener: socket.socket | None = None
        self._not_ready = ""
        self._wanted: Counter[str] = Counter()
        """Workers that were started, by queue."""

    def run(self) -> None:
        """Run until asked to stop by SIGTERM, SIGINT or SIGHUP.

        Raises:
            EmbeddedError: It could not start, or runs already.
        """
        self._home.prepare()
        with only_one(self._home), _signals(self._on_signal):
            sweep(Record.read(self._home))
            self._record.supervisor = Identity.of(os.getpid())
            self._record.started_at = datetime.now(UTC).isoformat(timespec="seconds")
            self._write("starting")
            phase: Phase = "stopping"
            try:
                self._start()
                self._write("ready")
                self._on_ready(self._record.url or "")
                self._watch()
            except Stopped:
                self._say("Stopped while starting.")
            except EmbeddedError as error:
                phase, self._record.error = "failed", str(error)
                raise
            finally:
                self._write(phase)
                self._end()
                if phase == "failed":
                    self._write(phase)  # for whoever waits for the start; no process is left in it
                else:
                    self._home.state_file.unlink(missing_ok=True)

    # --- start

    def _start(self) -> None:
        probe = DeviceProbe()
        try:
            # Held for as long as we live: a restarted API inherits the same socket.
            listener = self._listener = listen(self._options.port)
            port = listener.getsockname()[1]
            self._record.url = f"http://{LOOPBACK}:{port}"
            broker_url = self._options.broker_url or self._start_broker().url
            environment = child_environment(self._home, broker_url=broker_url)
            self._migrate(environment)
            self._launch(
                "api",
                _python("api", "--fd", str(listener.fileno()), "--drain-seconds", "5"),
                environment,
                stage=API,
                pass_fds=(listener.fileno(),),
            )
            self._start_all_workers(probe.result(), environment)
        finally:
            probe.cancel()
        self._home.write_private(self._home.url_file, f"{self._record.url}\n")

    def _start_broker(self) -> Broker:
        for _ in range(3):  # between choosing a port and listening on it, another may take it
            broker = prepare_broker(self._home)
            environment = child_environment(self._home, broker_url=broker.url)
            child = self._launch("broker", broker.argv, environment, stage=BROKER)
            deadline = time.monotonic() + BROKER_SECONDS
            while child.running and time.monotonic() < deadline:
                if broker.answers():
                    return broker
                self._pause(0.02)
            child.wait_or_kill(time.monotonic())
            self._children.remove(child)
        raise EmbeddedError(self._with_log("The broker did not start", "broker"))

    def _migrate(self, environment: dict[str, str]) -> None:
        self._say("database: migrations")
        log = self._home.logs / "migrate.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                _python("store", "migrate"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            deadline = time.monotonic() + MIGRATE_SECONDS
            try:
                while process.poll() is None:
                    if time.monotonic() > deadline:
                        raise EmbeddedError(self._with_log("Migrations take too long", "migrate"))
                    self._pause(0.02)
            finally:
                process.kill()
                process.wait()
        if process.returncode != 0:
            raise EmbeddedError(self._with_log("The database cannot be migrated", "migrate"))

    def _start_all_workers(self, found: Sequence[Device], environment: dict[str, str]) -> None:
        """Start the workers of accelerators, then those of the CPU, and wait until all serve."""
        # In this order: a worker of the CPU that is alone claims what waited for an accelerator.
        for devices in (found, [CPU]):
            for device in devices:
                self._start_workers(device, environment)
            if devices:
                self._wait_until(self._api_is_ready, READY_SECONDS, "The service is not ready")

    def _start_workers(self, device: Device, environment: dict[str, str]) -> None:
        # A worker's drain is bounded by its own setting; ours only has to be longer.
        grace = float(environment["GRIT_STOP_GRACE_SECONDS"]) + _DRAIN_MARGIN_SECONDS
        threads = str(inference_threads(environment))
        own = {**worker_environment(environment, kind=device.kind), **device.environment}
        for queue, pool in (
            (device.kind, ["solo"]),
            (f"infer.{device.kind}", ["threads", "-c", threads]),
        ):
            node = queue if device.card is None else f"{queue}-{device.card}"
            argv = _python(
                "celery", "-A", "worker.app", "worker", "-Q", queue, "-n", f"{node}@%h",
                "--without-gossip", "--without-mingle", "--loglevel", "INFO", "--pool", *pool,
            )  # fmt: skip
            self._launch(f"worker-{node}", argv, own, stage=WORKERS, grace_seconds=grace)
            self._wanted[queue] += 1

    def _launch(
        self,
        name: str,
        argv: list[str],
        environment: dict[str, str],
        *,
        stage: int,
        grace_seconds: float = 10.0,
        pass_fds: tuple[int, ...] = (),
    ) -> Child:
        self._check()
        log = self._home.logs / f"{name}.log"
        child = Child(
            name=name,
            argv=argv,
            environment=environment,
            log=log,
            stage=stage,
            grace_seconds=grace_seconds,
            pass_fds=pass_fds,
        )
        child.start()
        self._children.append(child)
        self._write("starting")
        self._say(f"{name}: started")
        return child

    def _api_is_ready(self) -> bool:
        url = (self._record.url or "").removeprefix("http://")
        connection = http.client.HTTPConnection(url, timeout=5.0)
        try:
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            self._not_ready = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return False
        else:
            return answer.status == 200 and _is_complete(self._not_ready, self._wanted)
        finally:
            connection.close()

    def _wait_until(self, ready: Callable[[], bool], seconds: float, complaint: str) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            self._revive()
            hopeless = [child for child in self._children if child.restarts >= 3]
            if hopeless:
                name = hopeless[0].name
                raise EmbeddedError(self._with_log(f"{name} dies again and again", name))
            if time.monotonic() > deadline:
                detail = f"{complaint} after {seconds:g} s: {_short(self._not_ready)}"
                raise EmbeddedError(self._with_log(detail, "api"))
            self._pause(0.1)

    # --- watch

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_SECONDS):
            self._revive()

    def _revive(self) -> None:
        for child in self._children:
            if child.revive():
                self._write(self._record.phase)
                if child.running:
                    self._say(f"{child.name}: started again after exit {child.last_exit}")

    # --- end

    def _end(self) -> None:
        if self._record.phase == "stopping":
            self._say("Stopping; a running job saves a checkpoint first.")
        for stage in (WORKERS, API, BROKER):
            group = [child for child in self._children if child.stage == stage]
            for child in group:
                child.ask_to_end()
            asked = time.monotonic()
            for child in group:
                while child.running and not self._hurry:
                    if time.monotonic() - asked > child.grace_seconds:
                        self._say(f"{child.name}: killed after {child.grace_seconds:g} s")
                        break
                    time.sleep(0.02)
                child.wait_or_kill(time.monotonic())
        self._children.clear()
        if self._listener is not None:
            self._listener.close()

    # --- the rest

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._hurry = self._stop.is_set()  # asked twice: no more patience
        self._stop.set()

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)
        self._check()

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _write(self, phase: Phase) -> None:
        self._record.phase = phase
        alive = {child.name: child.identity for child in self._children}
        self._record.processes = {name: item for name, item in alive.items() if item is not None}
        self._record.restarts = {child.name: child.restarts for child in self._children}
        self._record.write(self._home)

    def _with_log(self, complaint: str, name: str) -> str:
        log = self._home.logs / f"{name}.log"
        tail = log_tail(log)
        return f"{complaint}. The end of {log}:\n{tail}" if tail else f"{complaint}."


def inference_threads(environment: Mapping[str, str]) -> int:
    """Threads of an inference worker: its places, three beyond a batch, and one for other tasks."""
    try:
        max_batch = int(environment.get("GRIT_INFER_MAX_BATCH", ""))
    except ValueError:  # unset; or nonsense, of which the API's own log says more
        max_batch = DEFAULT_MAX_BATCH
    return max_batch + 4


def sweep(record: Record | None) -> list[str]:
    """End what an earlier supervisor left behind, and name it."""
    left = [
        (name, item) for name, item in (record.processes if record else {}).items() if item.alive()
    ]
    for _, item in left:
        item.end(grace_seconds=5.0)
    return [name for name, _ in left]


@contextmanager
def only_one(home: Home) -> Iterator[None]:
    """Hold the home's lock: one supervisor a home, for as long as it lives.

    Raises:
        EmbeddedError: Another one holds it.
    """
    with home.lock_file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EmbeddedError(f"The service of {home.folder} already runs.") from None
        yield


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _python(module: str, *arguments: str) -> list[str]:
    # -P: a file of the working folder must not stand in for one of our modules.
    return [sys.executable, "-P", "-m", module, *arguments]


def _is_complete(answer: str, wanted: Mapping[str, int]) -> bool:
    # The service calls itself ready without broker and workers, since jobs can wait; a start is
    # over when all that was started works.
    try:
        found = json.loads(answer)
        served = {each["queue"]: each["workers"] for each in found["queues"]}
        broker = found["checks"]["broker"]
    except (ValueError, KeyError, TypeError):
        return False
    return broker == "ok" and all(served.get(queue, 0) >= wanted[queue] for queue in wanted)


def _short(answer: str) -> str:
    try:
        return json.dumps(json.loads(answer))[:500]
    except ValueError:
        return answer[:500] or "nobody answers"
