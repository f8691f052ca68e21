"""A real service for measuring: `grit up` in a home of its own, with adapters in its store."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import psutil
import redis

from benchmarks.serving.bases import DIGITS
from grit_client.client import GritClient
from grit_client.embedded.record import Record
from grit_client.home import Home
from grit_core.artifacts import WEIGHTS
from grit_core.generation import AdapterSource
from store import adapters as rows
from store.database import create_engine_from, run_in_transaction
from store.ids import new_id
from store.manifests import file_sha256
from store.models import AdapterOrigin
from store.objects import Objects
from store.settings import Settings

ROOT: Final = Path(__file__).parents[2]
GRIT: Final = str(Path(sys.executable).with_name("grit"))
TEAM: Final = "default"
MODEL: Final = "digits-vlm"
API: Final = "api"
INFERENCE: Final = "worker-infer.cpu"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a process holds."""

    pid: int
    resident_bytes: int
    num_descriptors: int
    num_threads: int


class Deployment:
    """A running service and the way behind its counter."""

    def __init__(self, home: Path) -> None:
        self.home = Home.at(home)
        self.url = self.home.read_url() or ""
        self.headers = {"Authorization": f"Bearer {self.home.read_key()}"}
        self.settings = Settings(home=self.home.folder)
        self._engine = create_engine_from(self.settings)
        self._objects = Objects(self.settings)

    @cached_property
    def client(self) -> GritClient:
        """The Python client."""
        return GritClient(home=self.home.folder)

    @cached_property
    def broker(self) -> Any:
        """A connection to the embedded broker."""
        words = dict(
            line.split(" ", 1)
            for line in (self.home.broker_folder / "server.conf").read_text().splitlines()
        )
        return redis.Redis(port=int(words["port"]), password=words["requirepass"])

    def register(self, source: Path, name: str) -> None:
        """Register a base model and wait until its layers are read."""
        self.client.register_model(source, id=name, wait_seconds=120)

    def add_adapters(self, sources: Sequence[AdapterSource], *, model: str = MODEL) -> list[str]:
        """Store adapters as a job would, and record them; return their ids."""
        return [self._add(source, model) for source in sources]

    def _add(self, source: AdapterSource, model: str) -> str:
        adapter_id = new_id("adp")
        prefix = f"adapters/{adapter_id}"
        manifest = self._objects.put_folder(prefix, source.folder)
        run_in_transaction(
            self._engine,
            lambda session: rows.create_adapter(
                session,
                id=adapter_id,
                team=TEAM,
                origin=AdapterOrigin.IMPORT,
                model=model,
                prefix=prefix,
                name=source.id,
                sha256=file_sha256(source.folder / WEIGHTS),
                size_bytes=manifest.size_bytes,
                details={"manifest_sha256": manifest.sha256},
            ),
        )
        return adapter_id

    def logged_errors(self) -> dict[str, int]:
        """Lines of the processes' logs that tell of an error of the service's own."""
        return {
            log.stem: sum(
                '"level": "error"' in line or '"level": "critical"' in line
                for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
            )
            for log in sorted(self.home.logs.glob("*.log"))
        }

    # --- processes

    def pid(self, name: str) -> int | None:
        """The process of a name, if it lives."""
        record = Record.read(self.home)
        found = None if record is None else record.processes.get(name)
        return found.pid if found is not None and found.alive() else None

    def restarts(self, name: str) -> int:
        """How often the supervisor has started it again."""
        record = Record.read(self.home)
        return 0 if record is None else record.restarts.get(name, 0)

    def kill(self, name: str) -> int | None:
        """Kill a process without warning; return which, if there was one."""
        pid = self.pid(name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid

    def usage(self, name: str) -> Usage | None:
        """What a process and its children hold now, if it lives."""
        pid = self.pid(name)
        if pid is None:
            return None
        try:
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            return Usage(
                pid=pid,
                resident_bytes=sum(one.memory_info().rss for one in family),
                num_descriptors=sum(one.num_fds() for one in family),
                num_threads=sum(one.num_threads() for one in family),
            )
        except psutil.Error:
            return None

    def descriptors(self, name: str) -> dict[str, int]:
        """What a process has open, by kind: `socket`, `database`, `other`."""
        pid = self.pid(name)
        found = dict.fromkeys(("socket", "database", "other"), 0)
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = str(link.readlink())
            except OSError:
                continue  # closed since it was listed
            is_database = Path(target).name.startswith("grit.db")
            kind = "socket" if target.startswith("socket:") else "other"
            found["database" if is_database else kind] += 1
        return found

    def mailbox_keys(self) -> dict[str, str]:
        """What the broker keeps of inference: type, length and time to live by key."""
        found = {}
        for key in self.broker.scan_iter(match=f"{self.settings.queue_prefix}infer:*"):
            kind = self.broker.type(key).decode()
            length = {"list": self.broker.llen, "zset": self.broker.zcard}.get(kind)
            size = "" if length is None else f" of {length(key)}"
            found[key.decode()] = f"{kind}{size}, {self.broker.ttl(key)} s left"
        return found


@contextmanager
def running_service(
    folder: Path, *, environment: Mapping[str, str] | None = None, threads: int = 1
) -> Iterator[Deployment]:
    """Start a service with the digits VLM registered, and end it in any case.

    Args:
        folder: The home is made in it.
        environment: Settings beyond the defaults (`GRIT_...`).
        threads: Of each process; two cores are shared by all of them and by the clients.
    """
    home = folder / ".grit"
    passed = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        **(environment or {}),
    }
    command = [GRIT, "up", "--detach", "--home", str(home)]
    subprocess.run(command, check=True, cwd=ROOT, env=passed, capture_output=True)
    try:
        deployment = Deployment(home)
        deployment.register(DIGITS, MODEL)
        yield deployment
    finally:
        subprocess.run([GRIT, "down", "--home", str(home)], check=True, capture_output=True)


def keep_logs(deployment: Deployment, folder: Path) -> None:
    """Copy the logs out of a home that is about to be deleted."""
    shutil.copytree(deployment.home.logs, folder, dirs_exist_ok=True)


def wait_until(condition: Any, *, seconds: float, pause_seconds: float = 0.2) -> bool:
    """Wait for a condition; tell whether it came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(pause_seconds)
    return False
