"""Everything that a reader of the OpenAPI document sees is described, and its examples work."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.examples import ADAPTER, DATASET, FOLDER, body_examples
from api.examples import MODEL as EXAMPLE_MODEL
from api.openapi import snapshot
from store import base_models
from store.database import transaction
from store.keys import Scope
from store.settings import Settings
from tests.api.conftest import app_settings, new_team, opened, tiny_inventory
from tests.api.world import World

ROOT: Final = Path(__file__).parents[2]
DIGITS: Final = str(ROOT / "examples" / "digits-vlm")
DOCUMENT: Final = snapshot()
OPERATIONS: Final = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
BODIES: Final = [
    (name, media, label)
    for name, operation in OPERATIONS.items()
    for media, content in operation.get("requestBody", {}).get("content", {}).items()
    for label in content.get("examples", {"none": None})
]
ANSWERED_BY_A_WORKER: Final = {"POST /infer", "POST /v1/chat/completions"}


def undescribed(place: str, schema: Any) -> Iterator[str]:
    """Find the properties without a description, also in schemas that stand within others."""
    if isinstance(schema, list):
        for index, part in enumerate(schema):
            yield from undescribed(f"{place}[{index}]", part)
    if not isinstance(schema, dict):
        return
    for name, part in schema.items():
        if name == "properties":
            for field, value in part.items():
                if len(value.get("description", "").split()) < 2:
                    yield f"{place}.{field}"
        if name not in {"examples", "example", "default"}:
            yield from undescribed(f"{place}.{name}" if name != "properties" else place, part)


def test_every_property_is_described() -> None:
    found = list(undescribed("schemas", DOCUMENT["components"]["schemas"]))
    found += list(undescribed("paths", DOCUMENT["paths"]))
    assert not found, f"give each a docstring under its field: {', '.join(found)}"


def test_every_schema_is_described() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    plain = [name for name, schema in schemas.items() if not schema.get("description")]
    assert not plain, f"give each class a docstring: {', '.join(plain)}"


def test_every_parameter_is_described() -> None:
    found = [
        f"{name}: {parameter['name']}"
        for name, operation in OPERATIONS.items()
        for parameter in operation.get("parameters", ())
        if not parameter.get("description")
    ]
    assert not found, f"describe each in its route: {', '.join(found)}"


def test_an_operation_with_a_body_and_no_example_does_not_start() -> None:
    with pytest.raises(LookupError, match=r"POST /unknown takes a body and has no example"):
        body_examples("POST /unknown")


@pytest.fixture(scope="module")
def module_settings(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("examples")
    file = folder / "grit.db"
    file.write_bytes(sqlite_template.read_bytes())
    settings = app_settings(folder / "home", f"sqlite:///{file}")
    return settings.model_copy(update={"allowed_models": ["*"]})


@pytest.fixture(scope="module")
def example_app(module_settings: Settings) -> Iterator[FastAPI]:
    with opened(module_settings) as app:
        inventory = tiny_inventory()
        with transaction(app.state.services.engine) as session:
            base_models.register(session, id=EXAMPLE_MODEL, source=DIGITS)
            base_models.save_inventory(
                session,
                id=EXAMPLE_MODEL,
                inventory=inventory.to_json(),
                inventory_hash=inventory.hash,
            )
        yield app


@pytest.fixture(scope="module")
def world(example_app: FastAPI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with TestClient(example_app, raise_server_exceptions=False) as client:
        team = new_team(client, "ml", *Scope)
        yield World(team, example_app.state.services, tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("name", "media", "label"), BODIES, ids=[f"{name} {label}" for name, _, label in BODIES]
)
def test_every_example_of_a_body_is_taken(world: World, name: str, media: str, label: str) -> None:
    example = OPERATIONS[name]["requestBody"]["content"][media]["examples"][label]
    assert example["summary"]
    text = json.dumps(example["value"])
    for shown, real in (
        (DATASET, world.dataset),
        (ADAPTER, world.adapter),
        (FOLDER, DIGITS),
    ):
        text = text.replace(shown, real)
    body = json.loads(text)
    method, path = name.split()
    path = path.format(adapter_id=world.adapter, key_id=world.new_key(), name="ml")
    if media == "application/json":
        answer = world.team.request(method, path, json=body)
    else:
        answer = world.team.request(method, path, **form(body, world))
    if name in ANSWERED_BY_A_WORKER:
        assert answer.status_code == 503, answer.text
        assert "no_inference_worker" in answer.text
    else:
        assert answer.status_code < 300, answer.text


def form(body: dict[str, Any], world: World) -> dict[str, Any]:
    """The example as a form: files by name, as curl's `@` reads them, or their content."""
    sent = body.pop("file")
    if isinstance(sent, str):
        return {"files": {"file": ("rows.jsonl", sent.encode())}, "data": body}
    files = [("file", (each[1:], (world.folder / each[1:]).read_bytes())) for each in sent]
    return {"files": files, "data": body}
