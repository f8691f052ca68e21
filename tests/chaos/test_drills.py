"""Drills: one fault at a time, where it hurts, and what must come of it."""

import argparse
import random
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from store import attempts, jobs, keys, migrate
from store.attempts import NewAdapter
from store.database import create_engine_from, run_in_transaction, transaction
from store.errors import IllegalTransition, StorageUnavailable
from store.ids import new_id
from store.keys import Scope
from store.lifecycle import ENDED
from store.models import JobStatus
from store.objects import Objects
from store.settings import Settings
from store.workers import live_workers
from tests.api.conftest import app_settings, job_body, new_team, opened
from tests.builders import TEAM, new_job, prepare
from tests.chaos.invariants import violations
from tests.chaos.light_worker import LightWorker
from tests.chaos.parts import Process, Server
from tests.e2e.deployment import Deployment, WorkerProcess, deployed
from tests.faulty_proxy import Mode, faulty_proxy
from tests.ports import reserve_port
from tests.services import Postgres, running_postgres, server_folder
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

Result = TypeVar("Result")

_IMPATIENT = {
    "lease_seconds": 1.0,
    "heartbeat_seconds": 0.3,
    "reaper_seconds": 0.3,
    "backoff_first_seconds": 0.01,
    "backoff_cap_seconds": 0.02,
}

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    return write_jsonl(folder / "rows.jsonl", tiny_chat_rows(32, images=False))


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


# --- the broker


def test_a_broker_that_flaps_stops_no_running_job_and_is_heard_again_afterwards(
    tmp_path: Path, model: Path, rows: Path, valkey: str
) -> None:
    chance = random.Random(3)
    with faulty_proxy(port_of(valkey)) as proxy:
        broker = f"redis://127.0.0.1:{proxy.port}/0"
        with deployed(home=tmp_path / "home", broker_url=broker, queue_prefix="flap:") as service:
            service.prepare(model=model, rows=rows)
            service.start_worker().wait_warm()
            running = service.submit(max_steps=1500)
            service.wait_for_step(running, 3)
            for _ in range(8):
                proxy.mode = chance.choice([Mode.REFUSE, Mode.SILENT, Mode.SLOW])
                if proxy.mode is Mode.REFUSE:
                    proxy.reset_all()
                time.sleep(chance.uniform(0.1, 1.5))
                proxy.mode = Mode.PASS
                time.sleep(chance.uniform(0.0, 0.5))
            healed = time.monotonic()
            waiting = service.submit(ring=False, max_steps=3)
            assert service.wait_ended(running).attempt == 1
            job = service.wait_ended(waiting, timeout_seconds=60)

            assert job.status == JobStatus.SUCCEEDED
            assert time.monotonic() - healed < 45


# --- the database


@pytest.fixture
def database() -> Iterator[tuple[Server, int]]:
    port = reserve_port()
    with server_folder(postgres=True) as folder:
        server = Server("database", lambda: running_postgres(port=port, folder=folder))
        server.start()
        yield server, port
        server.vanish()


@pytest.fixture
def on_postgres(
    tmp_path: Path, model: Path, rows: Path, valkey: str, database: tuple[Server, int]
) -> Iterator[Deployment]:
    url = f"postgresql+psycopg://grit@127.0.0.1:{database[1]}/postgres"
    values = {"broker_url": valkey, "queue_prefix": f"{secrets.token_hex(4)}:", "database_url": url}
    with deployed(home=tmp_path / "home", **values) as service:
        service.prepare(model=model, rows=rows)
        yield service


def test_a_database_that_restarts_again_and_again_costs_a_running_job_no_attempt(
    on_postgres: Deployment, database: tuple[Server, int]
) -> None:
    on_postgres.start_worker(lease_seconds="20").wait_warm()
    job_id = on_postgres.submit(max_steps=600, checkpoint_every_steps=60)
    on_postgres.wait_for_step(job_id, 3)
    for _ in range(4):
        database[0].vanish()
        time.sleep(0.3)
        database[0].start()
        time.sleep(0.7)
    job = on_postgres.wait_ended(job_id)

    assert job.status == JobStatus.SUCCEEDED
    assert on_postgres.outcomes(job_id) == [("succeeded", None)]
    assert on_postgres.metric_steps(job_id) == list(range(1, 601))


def test_a_database_away_for_longer_than_the_lease_ends_the_training_before_another_begins(
    on_postgres: Deployment, database: tuple[Server, int]
) -> None:
    worker = on_postgres.start_worker(lease_seconds="8")
    worker.wait_warm()
    job_id = on_postgres.submit(max_steps=3000, checkpoint_every_steps=50)
    on_postgres.wait(job_id, lambda _job: on_postgres.checkpoint_steps(job_id) != [])
    child = worker.trainer()
    database[0].vanish()
    _, alive = psutil.wait_procs([child], timeout=8)
    assert not alive, "training goes on although its lease has expired"
    database[0].start()
    on_postgres.wait(job_id, lambda job: job.attempt == 2)
    on_postgres.cancel(job_id)
    on_postgres.wait_ended(job_id)

    assert on_postgres.outcomes(job_id)[0] == ("lost", "worker_lost")
    assert violations(on_postgres.engine, on_postgres.objects, accepted={job_id: job_id}) == [
        f"I1 mixed up: {job_id} was accepted as {job_id} and is None",
        "I1 unasked: None has a row and was never accepted",
    ]


def test_commits_whose_answer_is_lost_are_made_once(postgres: Postgres, tmp_path: Path) -> None:
    chance = random.Random(5)
    name = f"lossy_{secrets.token_hex(4)}"
    direct = Settings(home=tmp_path, database_url=postgres.create(name, template="grit_template"))
    with faulty_proxy(postgres.port) as proxy:
        lossy = direct.model_copy(
            update={
                "database_url": direct.database_url.replace(str(postgres.port), str(proxy.port))
            }
        )
        engine, through = create_engine_from(direct), create_engine_from(lossy)
        with transaction(engine) as session:
            dataset = prepare(session)
        proxy.cut_answer = lambda answer: b"COMMIT" in answer and chance.random() < 0.3
        accepted = {}
        for number in range(40):
            accepted[f"job-{number}"] = _create_and_finish(through, dataset, f"job-{number}")
        found = violations(engine, Objects(direct), accepted=accepted)
        for each in (engine, through):
            each.dispose()
        assert proxy.num_cut > 12
    postgres.drop(name)

    assert [each for each in found if "I6" not in each] == []


def _create_and_finish(engine: Engine, dataset: str, name: str) -> str:
    """Create, claim and complete a job; whatever gives up is done again, as a caller would."""

    def create() -> str:
        spec = new_job(dataset, name=name)
        return run_in_transaction(
            engine,
            lambda session: (
                jobs.create_job(
                    session, team=TEAM, spec=spec, idempotency_key=name, request_hash=name
                )[0].id
            ),
        )

    job_id = _until_done(create)
    claimed = _until_done(
        lambda: run_in_transaction(
            engine,
            lambda session: attempts.claim_next(
                session, queue="cpu", worker_id="wrk_1", lease_seconds=60
            ),
        )
    )
    if claimed is None:  # the claim was made, and its answer lost: the lease would expire
        attempt = _until_done(
            lambda: run_in_transaction(
                engine, lambda session: jobs.get_job(session, job_id, team=TEAM).attempt
            )
        )
    else:
        attempt = claimed.attempt
    adapter = NewAdapter(id=new_id("adp"), prefix=f"adapters/{name}")
    _until_done(
        lambda: run_in_transaction(
            engine,
            lambda session: (
                attempts.complete(
                    session, job_id=job_id, attempt=attempt, adapter=adapter, result={}
                ).id
            ),
        )
    )
    return job_id


def _until_done(work: Callable[[], Result]) -> Result:
    while True:
        try:
            return work()
        except StorageUnavailable:
            time.sleep(0.05)


# --- the front door


def test_a_front_door_that_is_told_to_stop_answers_whatever_it_stored(
    tmp_path: Path, model: Path, rows: Path, valkey: str
) -> None:
    with deployed(home=tmp_path / "home", broker_url=valkey) as service:
        service.prepare(model=model, rows=rows)
        with transaction(service.engine) as session:
            _, key = keys.create_key(session, team=TEAM, name="drill", scopes=[Scope.WRITE])
        port = reserve_port()
        door = Process(
            "api",
            [sys.executable, "-m", "api", "--port", str(port)],
            environment=service.environment,
            log=tmp_path / "api.log",
        )
        door.start()
        body = {"model": "tiny", "dataset": service.dataset_id, "config": {"text": {}}}
        answers: dict[str, str] = {}
        broken: list[str] = []
        over = threading.Event()

        def ask(caller: int) -> None:
            number = 0
            while not over.is_set():
                name = f"{caller}-{number}"
                number += 1
                try:
                    # A connection each: one that is kept alive may always be closed between two.
                    answer = httpx.post(
                        f"http://127.0.0.1:{port}/jobs",
                        json={**body, "name": name},
                        headers={"Authorization": f"Bearer {key}"},
                        timeout=20,
                    )
                    answers[name] = answer.json()["id"] if answer.status_code == 201 else ""
                except httpx.ConnectError:
                    time.sleep(0.05)
                except httpx.TransportError as error:
                    broken.append(f"{name}: {type(error).__name__}")

        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(ask, caller) for caller in range(4)]
            while len(answers) < 40:
                time.sleep(0.05)
                assert door.alive, door.text()[-2000:]
            door.ask_to_stop()
            while door.alive:
                time.sleep(0.05)
            over.set()
            for each in waiting:
                each.result()
        with transaction(service.engine, read_only=True) as session:
            stored = {
                row.name: row.id
                for row in jobs.list_jobs(
                    session, team=TEAM, filters=jobs.JobFilters(), limit=10_000
                ).rows
            }
        service.cancel_open_jobs()

        # What waited before the closed door was reset, and left nothing behind.
        assert stored == answers, broken


# --- orders


def test_a_cancel_that_no_worker_hears_is_kept(
    tmp_path: Path, model: Path, rows: Path, valkey: str
) -> None:
    with deployed(home=tmp_path / "home", broker_url=valkey, queue_prefix="deaf:") as service:
        service.prepare(model=model, rows=rows)
        worker = service.start_worker()
        job_id = service.submit(max_steps=100_000)
        service.wait_for_step(job_id, 3)
        worker.signal(signal.SIGKILL)
        worker.wait()
        service.cancel(job_id)
        assert service.job(job_id).status == JobStatus.CANCELLING
        service.start_worker()
        job = service.wait_ended(job_id)

        assert (job.status, job.attempt, job.result) == (JobStatus.CANCELLED, 1, None)
        assert service.adapters() == []


def test_orders_at_any_moment_leave_every_job_with_one_end(
    postgres_url: str, tmp_path: Path, valkey: str
) -> None:
    """Pause, resume, cancel and retry, while jobs are claimed, reported, published and reaped."""
    settings = Settings(
        home=tmp_path,
        database_url=postgres_url,
        broker_url=valkey,
        queue_prefix="orders:",
    ).model_copy(update=_IMPATIENT)
    engine = create_engine_from(settings)
    with transaction(engine) as session:
        dataset = prepare(session)
        ids = [
            jobs.create_job(session, team=TEAM, spec=new_job(dataset, name=str(number)))[0].id
            for number in range(120)
        ]
    workers = [_light_worker(settings, tmp_path, number) for number in range(3)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    chance = random.Random(7)
    orders = [jobs.request_pause, jobs.resume_job, jobs.request_cancel, jobs.retry_job]
    given = 0
    last_order = time.monotonic() + 60
    while given < 150 and time.monotonic() < last_order:
        order, job_id = chance.choice(orders), chance.choice(ids)
        with suppress(IllegalTransition):
            run_in_transaction(engine, lambda session, o=order, j=job_id: o(session, j, team=TEAM))
            given += 1
    deadline = time.monotonic() + 60
    while not _all_ended(engine, ids) and time.monotonic() < deadline:
        time.sleep(0.1)
    for worker in workers:
        worker.stopping = True
    for thread in threads:
        thread.join()
    accepted = {str(number): job_id for number, job_id in enumerate(ids)}
    found = violations(engine, Objects(settings), accepted=accepted)
    for worker in workers:
        worker.close()
    engine.dispose()

    assert found == []
    assert given == 150


# --- the tables


def test_a_migration_under_load_breaks_no_request_and_no_job(
    postgres_url: str, tmp_path: Path, valkey: str
) -> None:
    """The last revision is taken back and made again, while jobs are submitted and executed."""
    settings = app_settings(tmp_path / "home", postgres_url).model_copy(
        update={"broker_url": valkey, "queue_prefix": "moving:"}
        | _IMPATIENT
        # Longer than a lock is waited for. What a busy machine costs beyond that is no failure of
        # the migration's, so that a job may lose more leases than it ever will.
        | {"lease_seconds": 6.0, "max_attempts": 100}
    )
    accepted: dict[str, str] = {}
    seconds: list[float] = []

    def ask(method: str, path: str, **options: Any) -> Any:
        began = time.monotonic()
        answer = team.request(method, path, **options)
        seconds.append(time.monotonic() - began)
        assert answer.status_code < 300, answer.text
        return answer.json()

    with opened(settings) as app, TestClient(app) as client:
        team = new_team(client, "one")
        dataset = team.dataset()
        with _working(settings, tmp_path), _moving(settings) as moves:
            while len(accepted) < 60 or len(moves) <= 5:
                name = str(len(accepted))
                made = ask("POST", "/jobs", json=job_body(dataset, name=name))
                accepted[name] = made["id"]
                ask("GET", f"/jobs/{made['id']}")
            deadline = time.monotonic() + 300
            while ask("GET", "/jobs?status=queued&status=running")["data"]:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        engine = app.state.services.engine
        found = violations(engine, Objects(settings), accepted=accepted)
        with transaction(engine, read_only=True) as session:
            ends = {jobs.get_job(session, each, team="one").status for each in accepted.values()}

    assert (found, ends) == ([], {JobStatus.SUCCEEDED})
    # A lock that is not given within two seconds is asked for again: no request waits for a whole
    # migration, however slow the machine.
    assert max(seconds) < 60


@contextmanager
def _working(settings: Settings, folder: Path) -> Iterator[None]:
    """Have three light workers execute what waits."""
    workers = [_light_worker(settings, folder, number) for number in range(3)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.stopping = True
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.close()


@contextmanager
def _moving(settings: Settings) -> Iterator[list[float]]:
    """Take the last revision back and make it again, and again; note how long each took."""
    over = threading.Event()
    moves: list[float] = []

    def move() -> None:
        engine = create_engine_from(settings)
        while not over.wait(0.1):
            began = time.monotonic()
            migrate.downgrade(engine, "-1")
            migrate.upgrade(engine)
            moves.append(time.monotonic() - began)
        engine.dispose()

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield moves
    finally:
        over.set()
        thread.join()


def _light_worker(settings: Settings, folder: Path, number: int) -> LightWorker:
    options = argparse.Namespace(
        queue="cpu",
        seed=number,
        sleepy=0.05,
        unfenced=False,
        effects=folder / f"{number}.effects",
    )
    return LightWorker(settings, options)


def _all_ended(engine: Engine, ids: list[str]) -> bool:
    """Whether every job has an end; the paused ones are told to go on."""
    with transaction(engine) as session:
        found = [jobs.get_job(session, job_id, team=TEAM) for job_id in ids]
        for job in found:
            if job.status == JobStatus.PAUSED:
                jobs.resume_job(session, job.id, team=TEAM)
    return all(JobStatus(job.status) in ENDED for job in found)


# --- clocks


def test_workers_whose_clocks_are_wrong_neither_lose_a_lease_nor_keep_one(
    tmp_path: Path, model: Path, rows: Path, valkey: str
) -> None:
    """Leases are a matter of the database's clock and of monotonic ones."""
    with deployed(home=tmp_path / "home", broker_url=valkey, queue_prefix="skew:") as service:
        service.prepare(model=model, rows=rows)
        fast = service.start_worker(lease_seconds="3", pythonpath=_clock(tmp_path / "fast", 600))
        fast.wait_warm()
        job_id = service.submit(max_steps=1500, checkpoint_every_steps=100)
        service.wait_for_step(job_id, 3)
        slow = service.start_worker(
            lease_seconds="3",
            home=tmp_path / "elsewhere",
            pythonpath=_clock(tmp_path / "slow", -3600),
        )
        slow.wait_warm()
        assert service.wait_ended(job_id).attempt == 1

        job_id = service.submit(max_steps=100_000)
        service.wait_for_step(job_id, 3)
        job = service.job(job_id)
        holder, other = (fast, slow) if _holds(service, fast, job.worker_id) else (slow, fast)
        holder.signal(signal.SIGKILL)
        killed = time.monotonic()
        service.wait(job_id, lambda job: job.attempt == 2)
        assert time.monotonic() - killed < 10
        assert other.running
        service.cancel(job_id)
        service.wait_ended(job_id)


def _clock(folder: Path, ahead_seconds: int) -> Path:
    """Return a folder that makes a Python's wall clock wrong, by its `sitecustomize`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import time\n_right = time.time\ntime.time = lambda: _right() + {ahead_seconds}\n"
    )
    return folder


def _holds(service: Deployment, worker: WorkerProcess, worker_id: str | None) -> bool:
    with transaction(service.engine, read_only=True) as session:
        rows = {row.id: row.process_id for row in live_workers(session)}
    return rows.get(worker_id or "") == worker.pid
