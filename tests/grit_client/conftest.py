"""A real service: uvicorn on a port of its own, SQLite; the worker's part is played in rows."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from sqlalchemy import text

from api.app import create_app
from api.services import Services
from grit_client.cli import main
from grit_client.client import GritClient
from grit_client.connection import Retries
from grit_client.home import Home
from store import base_models, keys, workers
from store.database import transaction
from store.keys import Scope
from store.models import Base
from store.settings import Settings
from store.tables import known_revisions
from tests.api.conftest import MODEL, job_body, rows, tiny_inventory
from tests.run_guard import run_mark

GRIT = str(Path(sys.executable).with_name("grit"))


@dataclass(kw_only=True)
class Service:
    """A running service, and a home folder that leads to it."""

    url: str
    key: str
    home: Home
    services: Services
    folder: Path

    def client(self, **options: Any) -> GritClient:
        options.setdefault("retries", Retries(first_seconds=0.01, longest_seconds=0.1))
        return GritClient(self.url, self.key, **options)

    def key_with(self, *scopes: Scope) -> str:
        with transaction(self.services.engine) as session:
            _, text = keys.create_key(session, team="default", name="test", scopes=set(scopes))
        return text

    def rows_file(self, count: int = 10) -> Path:
        path = self.folder / "rows.jsonl"
        path.write_bytes(rows(count))
        return path

    def spec_file(self, **fields: Any) -> Path:
        path = self.folder / "job.json"
        path.write_text(json.dumps(job_body(fields.pop("dataset", "ds_none"), **fields)))
        return path


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running_service(tmp_path) as found:
        yield found


@contextmanager
def running_service(folder: Path, *, allowed_models: Sequence[str] = ("*",)) -> Iterator[Service]:
    """Run a service that knows one model and one worker; its home is `.grit` of a folder."""
    home = Home.at(folder / ".grit")
    home.prepare()
    settings = Settings(
        home=home.folder,
        key_file=home.key_file,
        broker_url="redis://127.0.0.1:1/0",
        allowed_models=list(allowed_models),
        inventory_wait_seconds=0.3,
        infer_timeout_seconds=1.0,
    )
    app = create_app(settings)
    services: Services = app.state.services
    Base.metadata.create_all(services.engine)
    with transaction(services.engine) as session:
        session.execute(text("CREATE TABLE alembic_version (version_num TEXT NOT NULL)"))
        session.execute(
            text("INSERT INTO alembic_version VALUES (:revision)"),
            {"revision": known_revisions()[-1]},
        )
        base_models.register(session, id=MODEL, source="/models/tiny")
        inventory = tiny_inventory()
        base_models.save_inventory(
            session, id=MODEL, inventory=inventory.to_json(), inventory_hash=inventory.hash
        )
        workers.register_worker(
            session, hostname="here", process_id=1, queues=["cpu"], device="cpu"
        )
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    home.url_file.write_text(f"{url}\n")
    try:
        yield Service(
            url=url, key=home.read_key() or "", home=home, services=services, folder=folder
        )
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def client(service: Service) -> Iterator[GritClient]:
    with service.client() as made:
        yield made


@dataclass(frozen=True)
class Ran:
    """What a run of the command line left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def interruptible() -> None:
    """Have a new process hear SIGINT, which a shell's background jobs ignore from the start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run one service for a module whose tests do not disturb each other."""
    with running_service(tmp_path_factory.mktemp("shared")) as found:
        yield found


@pytest.fixture
def cli(
    shared_service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Run the command line in this process, beside the home folder of the shared service."""
    monkeypatch.chdir(shared_service.folder)
    for name in ("COLUMNS", "GRIT_URL", "GRIT_API_KEY", "GRIT_HOME"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, **environment: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["grit", *map(str, arguments)])
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main()
        shown = capsys.readouterr()
        return Ran(int(ended.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture
def grit(tmp_path: Path) -> Callable[..., Ran]:
    """Run the real command in a process of its own, in an empty folder of its own."""

    def run(*arguments: object, **environment: str) -> Ran:
        done = subprocess.run(
            [GRIT, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **run_mark(), **environment},
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
