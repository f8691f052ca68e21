"""A real app over a real database; the worker's part is played by writing rows."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from api.app import create_app
from api.services import Services
from grit_core.config.model_configs import Modality
from grit_core.images import data_url
from grit_core.inventory import LayerRecord, ModelInventory
from store import base_models, keys, workers
from store.database import transaction
from store.keys import Scope
from store.settings import Settings

MODEL = "tests/tiny-smolvlm"


def tiny_inventory() -> ModelInventory:
    """A model with SmolVLM's names: 4 vision blocks, 6 text blocks, a connector."""
    layers = [
        LayerRecord(
            name=f"model.{tower}.layers.{block}.self_attn.{name}_proj",
            modality=modality,
            block=block,
            in_features=size,
            out_features=size,
        )
        for tower, modality, blocks, size in (
            ("vision_model.encoder", Modality.VISION, 4, 96),
            ("text_model", Modality.TEXT, 6, 128),
        )
        for block in range(blocks)
        for name in ("q", "k", "v")
    ]
    connector = LayerRecord(
        name="model.connector.modality_projection.proj",
        modality=Modality.CROSS_MODAL,
        block=None,
        in_features=384,
        out_features=128,
    )
    return ModelInventory(
        model_type="idefics3",
        architecture="Idefics3ForConditionalGeneration",
        layers=(*layers, connector),
        total_parameters=1_300_000,
        family="smolvlm",
        hidden_size=128,
        num_blocks=6,
        vocabulary_size=329,
        unsupported={"Conv2d": 1},
    )


@dataclass
class Team:
    """A caller's side of the service."""

    client: TestClient
    name: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def request(self, method: str, path: str, **options: Any) -> Any:
        headers = {**self.headers, **options.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **options)

    def get(self, path: str, **options: Any) -> Any:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> Any:
        return self.request("POST", path, **options)

    def delete(self, path: str) -> Any:
        return self.request("DELETE", path)

    def send(self, path: str, body: bytes, content_type: str = "application/json") -> Any:
        return self.post(path, content=body, headers={"Content-Type": content_type})

    def upload(self, data: bytes, *, filename: str = "rows.jsonl", **fields: str) -> Any:
        return self.post("/datasets", files={"file": (filename, data)}, data=fields)

    def dataset(self, count: int = 10) -> str:
        answer = self.upload(rows(count))
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def job(self, **fields: Any) -> dict[str, Any]:
        body = job_body(fields.pop("dataset", None) or self.dataset(), **fields)
        answer = self.post("/jobs", json=body)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())


def job_body(dataset: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "dataset": dataset, "preset": "smolvlm_fast", **fields}


def png(side: int = 4, color: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), color).save(buffer, format="PNG")
    return buffer.getvalue()


def row(answer: str = "yes", *, image: str | None = None) -> dict[str, Any]:
    url = data_url(png()) if image is None else image
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Is it grey?"},
    ]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
    }


def rows(count: int = 10) -> bytes:
    return b"".join(json.dumps(row(str(index))).encode() + b"\n" for index in range(count))


def app_settings(home: Path, database_url: str) -> Settings:
    """Settings of an app without a broker, with short waits and small bounds."""
    return Settings(
        home=home,
        database_url=database_url,
        objects_url="",
        broker_url="redis://127.0.0.1:1/0",
        allowed_models=[f"{home.parent}/models/*", "allowed/*"],
        inventory_wait_seconds=0.3,
        infer_timeout_seconds=1.0,
        max_body_bytes=200_000,
        max_upload_bytes=2_000_000,
    )


@contextmanager
def opened(settings: Settings) -> Iterator[FastAPI]:
    """Make an app that knows one model and one training worker."""
    made = create_app(settings)
    engine = made.state.services.engine
    with transaction(engine) as session:
        base_models.register(session, id=MODEL, source="/models/tiny")
        inventory = tiny_inventory()
        base_models.save_inventory(
            session, id=MODEL, inventory=inventory.to_json(), inventory_hash=inventory.hash
        )
        workers.register_worker(
            session, hostname="here", process_id=1, queues=["cpu"], device="cpu"
        )
    yield made
    # A test that never started the app has nobody who closes it.
    made.state.trail.close()
    engine.dispose()


def new_team(client: TestClient, name: str, *scopes: Scope) -> Team:
    """Make a key for a team, which may exist already."""
    chosen = set(scopes) or {Scope.READ, Scope.WRITE, Scope.INFER}
    app = cast("FastAPI", client.app)
    with transaction(app.state.services.engine) as session:
        _, token = keys.create_key(session, team=name, name="test", scopes=chosen)
    return Team(client, name, token)


@pytest.fixture
def api_database_url(sqlite_url: str) -> str:
    """The database of the app; some modules take PostgreSQL, which is the stricter one."""
    return sqlite_url


@pytest.fixture
def settings(tmp_path: Path, api_database_url: str) -> Settings:
    return app_settings(tmp_path / "home", api_database_url)


@pytest.fixture
def app(settings: Settings) -> Iterator[FastAPI]:
    with opened(settings) as made:
        yield made


@pytest.fixture
def services(app: FastAPI) -> Services:
    found: Services = app.state.services
    return found


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def join(client: TestClient) -> Callable[..., Team]:
    """Make teams with a key each."""
    return lambda name, *scopes: new_team(client, name, *scopes)


@pytest.fixture
def team(join: Callable[..., Team]) -> Team:
    return join("alpha")
