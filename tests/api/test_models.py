"""What the API says of a base model that its probe has found fit, and of one that it has not."""

import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import pytest
from sqlalchemy import Engine

from grit_core.inventory import ProbeFacts
from store import base_models
from store.database import transaction
from store.models import ModelStatus
from tests.api.conftest import Team, job_body, tiny_inventory

if TYPE_CHECKING:
    from fastapi import FastAPI

REASON = "The processor of allowed/broken needs num2words, which this worker lacks."


@pytest.fixture
def engine(team: Team) -> Engine:
    return cast("Engine", cast("FastAPI", team.client.app).state.services.engine)


def fail(engine: Engine, name: str) -> None:
    with transaction(engine) as session:
        base_models.save_failure(session, id=name, code="model_unavailable", message=REASON)


@pytest.fixture
def broken(engine: Engine) -> str:
    with transaction(engine) as session:
        base_models.register(session, id="allowed/broken", source="allowed/broken")
    fail(engine, "allowed/broken")
    return "allowed/broken"


def test_a_ready_model_shows_what_its_probe_found(team: Team, engine: Engine) -> None:
    facts = ProbeFacts(
        takes_text_only=True,
        max_images=2,
        image_tokens=64,
        default_layers=21,
        notes=("A row may show one image.",),
    )
    inventory = tiny_inventory()
    with transaction(engine) as session:
        base_models.register(session, id="allowed/probed", source="allowed/probed")
        base_models.save_inventory(
            session,
            id="allowed/probed",
            inventory={**inventory.to_json(), "probe": asdict(facts)},
            inventory_hash=inventory.hash,
        )
    shown = team.get("/models/allowed/probed").json()
    assert shown["probe"] == {**asdict(facts), "notes": list(facts.notes)}
    models = team.get("/models").json()["data"]
    assert [model["probe"] is None for model in models] == [False, True]


def test_a_failed_model_gives_its_reason_wherever_it_is_named(team: Team, broken: str) -> None:
    shown = team.get(f"/models/{broken}").json()
    assert (shown["status"], shown["failure"]["message"]) == ("failed", REASON)
    layers = team.get(f"/models/{broken}/layers")
    chat = {"model": broken, "messages": [{"role": "user", "content": "Hello?"}]}
    answers = [layers, team.post("/infer", json=chat)]
    assert [answer.status_code for answer in answers] == [409, 409]
    assert [REASON in answer.json()["detail"] for answer in answers] == [True, True]


def test_a_job_that_names_a_failed_model_has_it_probed_again_and_gives_the_reason(
    team: Team, broken: str, engine: Engine
) -> None:
    def probe_again() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with transaction(engine, read_only=True) as session:
                waits = base_models.get(session, broken).status == ModelStatus.REGISTERING
            if waits:
                fail(engine, broken)
                return

    worker = threading.Thread(target=probe_again)
    dataset = team.dataset()
    worker.start()
    answer = team.post("/jobs", json={**job_body(dataset), "model": broken})
    worker.join()
    assert answer.status_code == 422, answer.text
    (error,) = answer.json()["errors"]
    assert (error["code"], error["pointer"]) == ("model_unavailable", "/model")
    assert REASON in error["detail"]
