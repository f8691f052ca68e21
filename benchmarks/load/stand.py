"""What is measured against: real servers on loopback, each kept to its processor cores."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from benchmarks.load.rows import Filled, fill
from tests.ports import reserve_port
from tests.services import Postgres, running_postgres, running_valkey

ROOT: Final = Path(__file__).parents[2]
POOL_SIZE: Final = 10
START_SECONDS: Final = 60.0
RATES_OFF: Final = {
    f"GRIT_RATE_{name}_PER_MINUTE": "0"
    for name in ("REQUESTS", "SUBMISSIONS", "TEAM_REQUESTS", "TEAM_SUBMISSIONS")
}


def cores() -> tuple[list[int], list[int]]:
    """Return the core of the server that is measured, and those of everything else."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[:1], usable[1:]) if len(usable) > 1 else (usable, usable)


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: psutil.Process

    def resident_bytes(self) -> int:
        """Its memory at present."""
        return int(self.process.memory_info().rss)

    def processor_seconds(self) -> float:
        """What it has worked so far, in all its threads."""
        used = self.process.cpu_times()
        return float(used.user + used.system)


@dataclass
class Stand:
    """PostgreSQL and Valkey, and the way to start what talks to them."""

    postgres: Postgres
    broker_url: str
    core: list[int]
    filled: dict[int, Filled] = field(default_factory=dict)

    def database(self, num_jobs: int) -> Filled:
        """A database with so many jobs, made when it is first asked for."""
        if num_jobs not in self.filled:
            started = time.perf_counter()
            url = self.postgres.create(f"jobs_{num_jobs}")
            self.filled[num_jobs] = fill(url, num_jobs=num_jobs)
            say(f"{num_jobs:,} jobs in {time.perf_counter() - started:.0f} s")
        return self.filled[num_jobs]

    @contextmanager
    def service(self, database: Filled, **settings: str) -> Iterator[Server]:
        """Run the API as it is deployed: one process of `python -m api`."""
        environment = {
            "GRIT_DATABASE_URL": database.url,
            "GRIT_BROKER_URL": self.broker_url,
            "GRIT_POOL_SIZE": str(POOL_SIZE),
            "GRIT_WORKER_SEEN_SECONDS": "1000000",
            "GRIT_MAX_OPEN_JOBS": "1000000",
            **RATES_OFF,
            **settings,
        }
        with _running(["-m", "api"], environment, self.core, "/healthz") as server:
            yield server

    @contextmanager
    def bare(self, database: Filled) -> Iterator[Server]:
        """Run the hand-written peers, under the same server with the same options."""
        environment = {"BARE_DATABASE_URL": database.url, "BARE_BROKER_URL": self.broker_url}
        environment["BARE_POOL_SIZE"] = str(POOL_SIZE)
        with _running(["-m", "benchmarks.load.bare"], environment, self.core, "/plain") as server:
            yield server


@contextmanager
def running_stand() -> Iterator[Stand]:
    """Start the servers; they, the client and this process leave the first core to the API."""
    core, others = cores()
    os.sched_setaffinity(0, others)
    with ExitStack() as stack:
        postgres = stack.enter_context(running_postgres())
        broker_url = stack.enter_context(running_valkey())
        yield Stand(postgres, broker_url, core)


@contextmanager
def _running(
    module: list[str], environment: Mapping[str, str], core: list[int], path: str
) -> Iterator[Server]:
    """Start a Python server on a core of its own, and end it with the block."""
    port = reserve_port()
    with tempfile.TemporaryDirectory() as home:
        known: dict[str, Any] = {"OMP_NUM_THREADS": "1", "GRIT_HOME": home}
        process = subprocess.Popen(
            [sys.executable, *module, "--port", str(port)],
            env={**os.environ, **known, **environment},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=(Path(home) / "log").open("wb"),
            preexec_fn=lambda: os.sched_setaffinity(0, core),  # noqa: PLW1509 - no threads here
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url + path, process, Path(home) / "log")
            yield Server(url, psutil.Process(process.pid))
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)


def say(line: str) -> None:
    """Tell whoever waits."""
    print(line, flush=True)
