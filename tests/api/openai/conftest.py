"""A real service behind a port, and OpenAI's own client in front of it."""

import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from openai import OpenAI

from api.app import create_app
from api.services import Services
from store import base_models, keys, workers
from store.database import transaction
from store.keys import Scope
from store.settings import Settings
from tests.api.conftest import MODEL, tiny_inventory
from tests.e2e.deployment import ROOT, WorkerProcess

VLM = "tests/tiny-vlm"
HELLO: Any = [{"role": "user", "content": "Which digit is this?"}]
EVERYDAY = (Scope.READ, Scope.WRITE, Scope.INFER)


@dataclass(kw_only=True)
class Server:
    """A running service."""

    url: str
    services: Services
    clients: list[OpenAI] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def key(self, team: str, *scopes: Scope) -> str:
        with transaction(self.services.engine) as session:
            chosen = set(scopes or EVERYDAY)
            return keys.create_key(session, team=team, name="test", scopes=chosen)[1]

    def client(self, team: str, *scopes: Scope, **options: Any) -> OpenAI:
        """OpenAI's client as its documentation makes it, with a key of a team."""
        options = {"api_key": self.key(team, *scopes), "max_retries": 0, "timeout": 60, **options}
        made = OpenAI(base_url=self.base_url, **options)
        self.clients.append(made)
        return made


@contextmanager
def serving(settings: Settings) -> Iterator[Server]:
    """Serve an app that knows one model and one training worker."""
    app = create_app(settings)
    services: Services = app.state.services
    with transaction(services.engine) as session:
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
    running = Server(url=f"http://127.0.0.1:{port}", services=services)
    try:
        yield running
    finally:
        for client in running.clients:
            client.close()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def home_settings(folder: Path, template: Path, **changes: Any) -> Settings:
    """Settings of one machine, in a folder of its own, with small bounds."""
    shutil.copyfile(template, folder / "grit.db")
    return Settings(**{
        "home": folder,
        "allowed_models": ["*"],
        "broker_url": "redis://127.0.0.1:1/0",
        "inventory_wait_seconds": 0.3,
        "max_body_bytes": 200_000,
        "max_upload_bytes": 2_000_000,
        **changes,
    })


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, valkey: str
) -> Iterator[Server]:
    """One service for all tests of this folder; each test brings teams of its own."""
    settings = home_settings(
        tmp_path_factory.mktemp("openai"),
        sqlite_template,
        broker_url=valkey,
        queue_prefix=f"test-{os.getpid()}-openai:",
    )
    with serving(settings) as running:
        yield running


@pytest.fixture
def bare(tmp_path: Path, sqlite_template: Path) -> Iterator[Server]:
    """A service without a broker and without an inference worker."""
    with serving(home_settings(tmp_path, sqlite_template)) as running:
        yield running


@pytest.fixture
def team(request: pytest.FixtureRequest) -> str:
    """A team of this test's own."""
    return f"team-{abs(hash(request.node.nodeid)) % 10**12}"


@pytest.fixture
def client(server: Server, team: str) -> OpenAI:
    return server.client(team)


@pytest.fixture
def vlm(inference: Callable[[], str]) -> str:
    return inference()


@pytest.fixture
def ask(client: OpenAI, vlm: str) -> Callable[..., Any]:
    """Ask the tiny VLM for a short greedy answer."""

    def completed(**fields: Any) -> Any:
        fields = {"model": vlm, "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}
        return client.chat.completions.create(**fields)

    return completed


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def adapter_folder(source: str, folder: Path, *, model: str = VLM) -> Path:
    """Write an adapter of a small VLM that changes its answers."""
    import torch  # noqa: PLC0415 - as in `inference`
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    from grit_core.artifacts import write_adapter  # noqa: PLC0415
    from grit_core.models.pretrained import load_base_model  # noqa: PLC0415

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(0)
        adapted = get_peft_model(
            load_base_model(source), LoraConfig(r=4, target_modules=["v_proj"])
        )
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 2.0)
        write_adapter(folder, adapted, base_model_name=model)
    return folder


@pytest.fixture(scope="session")
def trained(
    inference: Callable[[], str], server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of an adapter that answers otherwise than its base model."""
    with transaction(server.services.engine, read_only=True) as session:
        source = base_models.get(session, inference()).source
    return adapter_folder(source, tmp_path_factory.mktemp("adapters") / "adapter")


@pytest.fixture(scope="session")
def inference(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], str]]:
    """A real inference worker, in a process of its own; called, it waits for the tiny VLM."""
    # Imported here: it loads torch, which the other tests of this folder do without.
    from tests.tiny_models import tiny_vlm_folder  # noqa: PLC0415

    settings = server.services.settings
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "infer.cpu"]
    command += ["--pool=threads", "-c", "4", "--without-gossip", "--without-mingle"]
    environment = {
        **os.environ,
        "GRIT_HOME": str(settings.home),
        "GRIT_DATABASE_URL": settings.database_url,
        "GRIT_OBJECTS_URL": settings.objects_url,
        "GRIT_BROKER_URL": settings.broker_url,
        "GRIT_QUEUE_PREFIX": settings.queue_prefix,
        "GRIT_WORKER_SEEN_SECONDS": "3",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    worker = WorkerProcess(command, environment, settings.home / "infer.log")
    folder = str(tiny_vlm_folder(tmp_path_factory.mktemp("models")))
    with transaction(server.services.engine) as session:
        base_models.register(session, id=VLM, source=folder)

    def ready() -> str:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            assert worker.running, worker.text()[-3000:]
            with transaction(server.services.engine, read_only=True) as session:
                if base_models.get(session, VLM).status == "ready":
                    return VLM
            time.sleep(0.1)
        raise TimeoutError(worker.text()[-3000:])

    yield ready
    worker.stop()
