"""The real service in killable parts: PostgreSQL, Valkey, the object store, APIs and workers."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from store import datasets, keys
from store.database import run_in_transaction
from store.keys import Scope
from store.models import DatasetStatus
from tests.chaos.parts import Process, Server
from tests.e2e.deployment import Deployment, deployed
from tests.ports import reserve_port, reserve_s3_ports
from tests.services import running_postgres, running_s3, running_valkey, server_folder
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

LIGHT_QUEUE = "cuda"
"""The queue of the light workers: no machine of these tests has another use for it."""
_GENEROUS = {
    "max_open_jobs": "1000000",
    "max_infra_failures": "1000",
    "max_attempts": "1000",
    "rate_submissions_per_minute": "0",
    "rate_team_submissions_per_minute": "0",
}
"""Kills are not the jobs' fault here, no job is to run out of attempts, and no caller of rate."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A team's key, and the dataset that its jobs name."""

    team: str
    key: str
    dataset: str


class Service:
    """A deployment on PostgreSQL and S3, whose every part can be killed and started again."""

    def __init__(
        self,
        deployment: Deployment,
        *,
        database: Server,
        broker: Server,
        objects: Server,
        broker_folder: Path,
    ) -> None:
        self.deployment = deployment
        self.database = database
        self.broker = broker
        self.objects = objects
        self._broker_folder = broker_folder
        self.apis: list[Process] = []
        self.urls: list[str] = []
        self.light_workers: list[Process] = []
        self.trainers: list[Process] = []

    @property
    def home(self) -> Path:
        """The folder of the logs."""
        return self.deployment.settings.home

    def add_api(self) -> Process:
        """Start another front door."""
        port = reserve_port()
        process = self._process(f"api-{len(self.apis)}", ["api", "--port", str(port)])
        self.apis.append(process)
        self.urls.append(f"http://127.0.0.1:{port}")
        return process

    def add_light_worker(self, *options: str, seed: int = 0) -> Process:
        """Start another worker that trains nothing."""
        name = f"light-{len(self.light_workers)}"
        command = ["tests.chaos.light_worker", "--queue", LIGHT_QUEUE, "--seed", str(seed)]
        command += ["--effects", str(self.home / f"{name}.effects"), *options]
        process = self._process(name, command)
        self.light_workers.append(process)
        return process

    def add_trainer(self) -> Process:
        """Start another training worker, with a home of its own as on another machine."""
        name = f"trainer-{len(self.trainers)}"
        command = ["celery", "-A", "worker.app", "worker", "-Q", "cpu", "--pool=solo"]
        command += ["-n", f"{name}@%h", "--without-gossip", "--without-mingle"]
        process = self._process(name, command, GRIT_HOME=str(self.home / name))
        self.trainers.append(process)
        return process

    def effect_files(self) -> list[Path]:
        """What the light workers noted."""
        return sorted(self.home.glob("*.effects"))

    def join(self, team: str) -> Caller:
        """Make a team with a key, and a dataset of its own."""
        rows = self.deployment.rows

        def work(session: Session) -> Caller:
            scopes = [Scope.READ, Scope.WRITE]
            _, key = keys.create_key(session, team=team, name="chaos", scopes=scopes)
            dataset = datasets.create_dataset(
                session,
                team=team,
                status=DatasetStatus.READY,
                object_key=self._dataset_key,
                sha256=Path(self._dataset_key).stem,
                size_bytes=rows.stat().st_size,
                num_rows=self.deployment.num_rows,
            )
            return Caller(team=team, key=key, dataset=dataset.id)

        return run_in_transaction(self.deployment.engine, work)

    @property
    def _dataset_key(self) -> str:
        (key,) = [found.key for found in self.deployment.objects.list("datasets")]
        return key

    def forget_broker_data(self) -> None:
        """Have the broker come back empty."""
        self.broker.vanish()
        shutil.rmtree(self._broker_folder)
        self._broker_folder.mkdir()

    def revive(self) -> None:
        """Start whatever is down, and thaw what is frozen."""
        for server in (self.database, self.broker, self.objects):
            server.start()
        for process in self.processes():
            if process.frozen:
                process.thaw()
            process.start()

    def processes(self) -> Sequence[Process]:
        """Our own processes."""
        return [*self.apis, *self.light_workers, *self.trainers]

    def stop_processes(self) -> None:
        """End our own processes in good order."""
        for process in self.processes():
            process.stop()

    def _process(self, name: str, module: list[str], **changes: str) -> Process:
        process = Process(
            name,
            [sys.executable, "-m", *module],
            environment={**self.deployment.environment, **changes},
            log=self.home / f"{name}.log",
        )
        process.start()
        return process


@contextmanager
def running_service(folder: Path, **settings: str) -> Iterator[Service]:
    """Start the servers, migrate, register a tiny model and its rows; no API and no worker yet."""
    with ExitStack() as stack:
        postgres_folder = stack.enter_context(server_folder(postgres=True))
        objects_folder = stack.enter_context(server_folder())
        broker_folder = folder / "broker"
        broker_folder.mkdir(parents=True)
        ports = reserve_port(), reserve_port(), reserve_s3_ports()
        database = Server(
            "database", lambda: running_postgres(port=ports[0], folder=postgres_folder)
        )
        broker = Server("broker", lambda: running_valkey(port=ports[1], folder=broker_folder))
        objects = Server("objects", lambda: running_s3(port=ports[2], folder=objects_folder))
        for server in (database, broker, objects):
            stack.callback(server.vanish)
            server.start()
        values: dict[str, str | Path] = {
            **_GENEROUS,
            "home": folder / "home",
            "broker_url": f"redis://127.0.0.1:{ports[1]}/0",
            "database_url": f"postgresql+psycopg://grit@127.0.0.1:{ports[0]}/postgres",
            "objects_url": "s3://grit/chaos",
            "s3_endpoint": f"http://127.0.0.1:{ports[2]}",
            "s3_region": "us-east-1",
            "s3_access_key_id": "tests",
            "s3_secret_access_key": "tests-secret",
            **settings,
        }
        deployment = stack.enter_context(deployed(**values))
        model = tiny_causal_folder(folder / "model")
        rows = write_jsonl(folder / "rows.jsonl", tiny_chat_rows(32, images=False))
        deployment.prepare(model=model, rows=rows)
        service = Service(
            deployment,
            database=database,
            broker=broker,
            objects=objects,
            broker_folder=broker_folder,
        )
        stack.callback(service.stop_processes)
        yield service
