"""A small deployment for tests: real broker, database and objects, and workers as processes."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from api.compression import consider_compression
from api.schemas.adapters import AdapterCompress
from api.services import open_services
from grit_core.config.model_configs import (
    LayerSelectionStrategy,
    ModalityConfig,
    ModelGRITConfig,
    config_to_dict,
)
from grit_core.config.training import TrainingConfig
from grit_core.models.inventory import ModelInventory, build_inventory
from grit_core.plan import plan_adaptation, resolve_training
from store import adapters, attempts, base_models, datasets, events, jobs
from store.database import create_engine_from, run_in_transaction, transaction
from store.ids import new_id
from store.lifecycle import ENDED, OPEN
from store.manifests import file_sha256
from store.migrate import upgrade
from store.models import Adapter, DatasetStatus, Event, Job, JobStatus, Team
from store.objects import Objects
from store.queue import Doorbell
from store.settings import Settings
from tests.ports import reserve_port
from tests.services import running_valkey

ROOT = Path(__file__).resolve().parents[2]
TEAM = "tests"
MODEL = "tiny"
FAST = {
    "heartbeat_seconds": "0.3",
    "lease_seconds": "5",
    "reaper_seconds": "0.4",
    "ring_again_seconds": "1",
    "backoff_first_seconds": "0.1",
    "backoff_cap_seconds": "0.2",
    "stop_grace_seconds": "30",
}
"""Settings that let a test see in seconds what a deployment does in minutes."""


class WorkerProcess:
    """One Celery worker of its own process."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def crashed(self) -> bool:
        """Whether it ended with an error of its own."""
        return (self._process.poll() or 0) > 0

    def children(self) -> list[psutil.Process]:
        """The training processes, the oldest first."""
        children = psutil.Process(self.pid).children()
        return sorted(children, key=lambda child: child.create_time())

    def trainer(self) -> psutil.Process:
        """The training process that has a job: the oldest."""
        return self.children()[0]

    def wait_warm(self, timeout_seconds: float = 120) -> None:
        """Wait until its first training process has imported everything."""
        deadline = time.monotonic() + timeout_seconds
        while "child_ready" not in self.text():
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_seconds: float = 60) -> int:
        return self._process.wait(timeout_seconds)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Broker:
    """A Valkey that can be stopped and started again with its data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = reserve_port()
        self._running = ExitStack()
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        self._running.enter_context(running_valkey(port=self._port, folder=self._folder))

    def stop(self) -> None:
        self._running.close()


class Deployment:
    """Rows, objects, a broker and any number of workers in one home folder."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self.settings = settings
        urls = {
            "GRIT_DATABASE_URL": settings.database_url,
            "GRIT_OBJECTS_URL": settings.objects_url,
        }
        self.environment: dict[str, str] = {
            **os.environ,
            **environment,
            **urls,
            "OMP_NUM_THREADS": "1",
        }
        self.engine = create_engine_from(settings)
        self.objects = Objects(settings)
        self.doorbell = Doorbell(settings)
        self.workers: list[WorkerProcess] = []
        self._inventory: ModelInventory | None = None

    # --- making

    def prepare(self, *, model: Path, rows: Path) -> None:
        """Register the model and upload the rows, as the API and its workers would."""
        self.num_rows = len(rows.read_text().splitlines())
        with transaction(self.engine) as session:
            session.add(Team(name=TEAM))
        self.dataset_id = self.upload(rows)
        self.model, self.rows = model, rows
        self.register(MODEL, model)

    def upload(self, rows: Path) -> str:
        """Store rows as a dataset, and return its id."""
        sha256 = file_sha256(rows)
        key = f"datasets/{sha256}.jsonl"
        self.objects.put_file(key, rows)
        with transaction(self.engine) as session:
            return datasets.create_dataset(
                session,
                team=TEAM,
                status=DatasetStatus.READY,
                object_key=key,
                sha256=sha256,
                size_bytes=rows.stat().st_size,
                num_rows=len(rows.read_text().splitlines()),
            ).id

    def register(self, name: str, folder: Path) -> None:
        """Register a model; all of them have the same layers."""
        inventory = self._inventory = build_inventory(str(folder))
        with transaction(self.engine) as session:
            base_models.register(session, id=name, source=str(folder))
            base_models.save_inventory(
                session, id=name, inventory=inventory.to_json(), inventory_hash=inventory.hash
            )

    def start_worker(
        self, *, pythonpath: Path | None = None, **changes: str | Path
    ) -> WorkerProcess:
        """Start a training worker, its settings changed as given."""
        name = f"worker-{len(self.workers)}"
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "cpu"]
        command += ["--pool=solo", "-n", f"{name}@%h", "--without-gossip", "--without-mingle"]
        changed = {f"GRIT_{setting.upper()}": str(value) for setting, value in changes.items()}
        if pythonpath is not None:
            changed["PYTHONPATH"] = str(pythonpath)
        log = self.settings.home / f"{name}.log"
        worker = WorkerProcess(command, {**self.environment, **changed}, log)
        self.workers.append(worker)
        return worker

    def worker(self) -> WorkerProcess:
        """The worker that was started last, or a new one if that has ended."""
        if self.workers and self.workers[-1].running:
            return self.workers[-1]
        return self.start_worker()

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.doorbell.close()
        self.engine.dispose()

    # --- asking

    def submit(
        self,
        *,
        model: str = MODEL,
        ring: bool = True,
        max_attempts: int = 3,
        retention_dataset_id: str | None = None,
        config: ModelGRITConfig | None = None,
        plan_changes: Mapping[str, Any] | None = None,
        **training: Any,
    ) -> str:
        """Create a job and ring; returns its id."""
        if self._inventory is None:
            raise RuntimeError("prepare() comes first")
        config = config or tiny_config()
        plan = plan_adaptation(config, self._inventory)
        asked = TrainingConfig(**{
            "batch_size": 2,
            "epochs": 10_000,
            "precision": "float32",
            **training,
        })
        resolved = resolve_training(asked, num_rows=self.num_rows, device="cpu")
        spec = jobs.NewJob(
            model=model,
            dataset_id=self.dataset_id,
            retention_dataset_id=retention_dataset_id,
            request={"model": model, "eval_fraction": 0.0},
            config=config_to_dict(config),
            training=dataclasses.asdict(resolved),
            plan={**plan.to_json(), **(plan_changes or {})},
            plan_hash=plan.plan_hash,
            device="cpu",
            queue="cpu",
            max_attempts=max_attempts,
        )
        return self._create(spec, ring=ring)

    def compress(self, adapter_id: str, *, ring: bool = True, **fields: Any) -> str:
        """Create a compression as the API would and ring; returns its id."""
        services = open_services(self.settings)
        spec = consider_compression(services, TEAM, adapter_id, AdapterCompress(**fields))
        services.engine.dispose()
        return self._create(spec, ring=ring)

    def _create(self, spec: jobs.NewJob, *, ring: bool) -> str:
        job, _ = run_in_transaction(
            self.engine, lambda session: jobs.create_job(session, team=TEAM, spec=spec)
        )
        if ring:
            self.doorbell.ring("cpu")
        return job.id

    def cancel(self, job_id: str) -> None:
        run_in_transaction(
            self.engine, lambda session: jobs.request_cancel(session, job_id, team=TEAM)
        )

    def cancel_open_jobs(self) -> None:
        """Leave no work behind for the next test."""
        filters = jobs.JobFilters(statuses=tuple(OPEN))
        with transaction(self.engine, read_only=True) as session:
            page = jobs.list_jobs(session, team=TEAM, filters=filters)
        for job in page.rows:
            self.cancel(job.id)

    def pause(self, job_id: str) -> None:
        run_in_transaction(
            self.engine, lambda session: jobs.request_pause(session, job_id, team=TEAM)
        )

    def resume(self, job_id: str) -> None:
        run_in_transaction(self.engine, lambda session: jobs.resume_job(session, job_id, team=TEAM))
        self.doorbell.ring("cpu")

    def job(self, job_id: str) -> Job:
        with transaction(self.engine, read_only=True) as session:
            return jobs.get_job(session, job_id, team=TEAM)

    def events(self, job_id: str) -> list[Event]:
        with transaction(self.engine, read_only=True) as session:
            return events.read(session, job_id, limit=10_000)

    def outcomes(self, job_id: str) -> list[tuple[str, str | None]]:
        """The outcome and the failure's code of every attempt."""
        with transaction(self.engine, read_only=True) as session:
            return [
                (row.outcome, row.failure["code"] if row.failure else None)
                for row in jobs.list_attempts(session, job_id)
            ]

    def checkpoint_steps(self, job_id: str) -> list[int]:
        with transaction(self.engine, read_only=True) as session:
            return [row.step for row in attempts.list_checkpoints(session, job_id)]

    def metric_steps(self, job_id: str) -> list[int]:
        with transaction(self.engine, read_only=True) as session:
            return [row.step for row in events.read_metrics(session, job_id)]

    def adapters(self) -> list[Adapter]:
        """Every adapter, the newest first."""
        with transaction(self.engine, read_only=True) as session:
            return adapters.list_adapters(session, team=TEAM, limit=100).rows

    # --- waiting

    def wait(
        self, job_id: str, what: Callable[[Job], bool], *, timeout_seconds: float = 120
    ) -> Job:
        """Wait until the row says so.

        Raises:
            TimeoutError: It did not; the message holds the row and the end of the workers' logs.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            job = self.job(job_id)
            if what(job):
                return job
            crashed = any(worker.crashed for worker in self.workers)
            if crashed or time.monotonic() > deadline:
                logs = "\n".join(worker.text()[-3000:] for worker in self.workers)
                state = (job.status, job.phase, job.status_reason, job.progress, job.error)
                raise TimeoutError(f"{state}\n{self.outcomes(job_id)}\n{logs}")
            time.sleep(0.05)

    def wait_for_step(self, job_id: str, step: int) -> Job:
        return self.wait(
            job_id,
            lambda job: (
                JobStatus(job.status) in ENDED
                or bool(job.progress and (job.progress.get("step") or 0) >= step)
            ),
        )

    def wait_ended(self, job_id: str, *, timeout_seconds: float = 120) -> Job:
        return self.wait(
            job_id, lambda job: JobStatus(job.status) in ENDED, timeout_seconds=timeout_seconds
        )

    def adapter_folder(self, job: Job, folder: Path) -> Path:
        """Download the adapter of a succeeded job."""
        assert job.status == JobStatus.SUCCEEDED, (job.status, job.status_reason, job.error)
        assert job.result is not None
        target = folder / new_id("adp")
        self.objects.get_folder(f"adapters/{job.result['adapter']}", target)
        return target


def tiny_config() -> ModelGRITConfig:
    """Every text layer, at rank 2, with the curvature refreshed often."""
    return ModelGRITConfig(
        text=ModalityConfig(strategy=LayerSelectionStrategy.ALL),
        global_rank=2,
        global_alpha=4,
        fisher_update_freq=5,
    )


@contextmanager
def deployed(**values: str | Path) -> Iterator[Deployment]:
    """Yield a migrated deployment with these settings, and stop its workers at the end."""
    settings = Settings(**{**FAST, **values})  # type: ignore[arg-type] # pydantic reads the texts
    environment = {f"GRIT_{name.upper()}": str(value) for name, value in {**FAST, **values}.items()}
    settings.home.mkdir(parents=True, exist_ok=True)
    deployment = Deployment(settings, environment)
    upgrade(deployment.engine)
    try:
        yield deployment
    finally:
        deployment.close()
