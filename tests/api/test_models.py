"""What the API says of a base model that its probe has found fit, and of one that it has not."""

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from huggingface_hub import constants
from sqlalchemy import Engine

from grit_core.inventory import ProbeFacts
from store import adapters, base_models, workers
from store.database import transaction
from store.keys import Scope
from store.models import AdapterOrigin, ModelStatus
from store.settings import Settings
from tests.api.conftest import MODEL, Team, app_settings, job_body, new_team, tiny_inventory
from tests.api.test_bad_input import check
from tests.hub_server import HubServer, hub_server
from worker.model_prober import ModelProber

if TYPE_CHECKING:
    from fastapi import FastAPI

REASON = "The processor of allowed/broken needs num2words, which this worker lacks."


@pytest.fixture
def settings(tmp_path: Path, api_database_url: str) -> Settings:
    """As patient as the service is; waits end when the prober has answered."""
    found = app_settings(tmp_path / "home", api_database_url)
    return found.model_copy(update={"inventory_wait_seconds": 30.0, "hub_seconds": 30.0})


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


# --- names


def imported(engine: Engine) -> str:
    with transaction(engine) as session:
        row = adapters.create_adapter(
            session, team="alpha", origin=AdapterOrigin.IMPORT, model=MODEL, prefix="adapters/one/"
        )
        return row.id


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub with one model, whose files are none of transformers."""
    folder = tmp_path / "hub-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with hub_server() as server:
        server.models = {"allowed/there": folder, "allowed/gated": folder}
        server.gated.add("allowed/gated")
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def prober(team: Team, engine: Engine) -> Iterator[ModelProber]:
    """What every worker runs beside its tasks, without a bell."""
    settings = cast("FastAPI", team.client.app).state.services.settings
    quick = settings.model_copy(update={"reaper_seconds": 0.05, "hub_seconds": 5.0})
    made = ModelProber(quick, engine, worker_id="wrk_1")
    made.start()
    yield made
    made.stop()


@pytest.mark.usefixtures("prober", "hub")
def test_a_wrong_model_name_answers_with_the_nearest_ids_and_is_not_listed(team: Team) -> None:
    job = {**job_body(team.dataset()), "model": "allowed/tiny-smolvml"}
    tuning = {"model": "allowed/tiny-smolvml", "training_file": job["dataset"]}
    for path, body, pointer in (
        ("/jobs", job, "/model"),
        ("/jobs/plan", job, "/model"),
        ("/models", {"id": "allowed/tiny-smolvml"}, "/id"),
        ("/models", {"id": "mine", "source": "allowed/tiny-smolvml"}, "/source"),
        ("/v1/fine_tuning/jobs", tuning, None),
    ):
        answer = team.post(path, json=body)
        if pointer is None:  # in the words of OpenAI
            assert answer.status_code == 400, answer.text
            detail = answer.json()["error"]["message"]
        else:
            (error,) = check(answer, 422, "request_invalid")["errors"]
            assert (error["code"], error["pointer"]) == ("model_not_found", pointer)
            assert error["input"] == "allowed/tiny-smolvml"
            detail = error["detail"]
        assert f"Did you mean {MODEL}?" in detail
        assert "The hub has no public model 'allowed/tiny-smolvml'" in detail
        assert detail.lower().count("hub") == 1
    assert [model["id"] for model in team.get("/models").json()["data"]] == [MODEL]


@pytest.mark.usefixtures("prober")
@pytest.mark.parametrize(
    ("status", "name", "code", "words"),
    [
        (503, "allowed/there", "hub_unreachable", "cannot be reached from the workers"),
        (None, "allowed/gated", "model_gated", "HF_TOKEN"),
    ],
)
def test_a_hub_that_is_down_and_a_gated_model_are_told_apart_from_a_wrong_name(
    team: Team, hub: HubServer, status: int | None, name: str, code: str, words: str
) -> None:
    hub.status = status
    answer = team.post("/jobs", json={**job_body(team.dataset()), "model": name})
    (error,) = check(answer, 422, "request_invalid")["errors"]
    assert error["code"] == code
    assert words in error["detail"]
    assert f"Registered: {MODEL}." in error["detail"]


@pytest.mark.usefixtures("prober", "hub")
def test_a_model_that_the_hub_has_is_accepted_before_it_is_probed(
    team: Team, engine: Engine
) -> None:
    answer = team.post("/models", json={"id": "allowed/there"})
    assert answer.status_code == 202, answer.text
    with transaction(engine, read_only=True) as session:
        assert base_models.get(session, "allowed/there").found_at is not None


def test_an_id_of_an_adapter_as_model_says_what_it_is_and_what_to_write(
    team: Team, engine: Engine
) -> None:
    adapter = imported(engine)
    bodies = {
        "/jobs": {**job_body(team.dataset()), "model": adapter},
        "/models": {"id": adapter},
        "/infer": {"model": adapter, "prompt": "?"},
    }
    for path, body in bodies.items():
        (error,) = check(team.post(path, json=body), 422, "request_invalid")["errors"]
        assert error["code"] == "model_not_found"
        assert f"is an adapter of the model '{MODEL}'" in error["detail"]
        assert "send its id as `adapter`" in error["detail"]


def test_the_name_of_an_adapter_as_model_is_answered_with_its_id(
    team: Team, engine: Engine
) -> None:
    with transaction(engine) as session:
        named = adapters.create_adapter(
            session,
            team="alpha",
            origin=AdapterOrigin.IMPORT,
            model=MODEL,
            prefix="adapters/named/",
            name="invoices",
        ).id
    answer = team.post("/infer", json={"model": "invoices", "prompt": "?"})
    (error,) = check(answer, 422, "request_invalid")["errors"]
    assert (
        f"'invoices' is the name of {named}, an adapter of the model '{MODEL}'" in error["detail"]
    )
    other = new_team(team.client, "others", Scope.READ, Scope.WRITE, Scope.INFER)
    answer = other.post("/infer", json={"model": "invoices", "prompt": "?"})
    (error,) = check(answer, 422, "request_invalid")["errors"]
    assert "The model 'invoices' is not registered." in error["detail"]


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/org/name",
        "https://hf.co/org/name/tree/main",
        "huggingface.co/org/name",
        "hf://org/name",
    ],
)
def test_an_address_of_the_hub_is_answered_with_the_hub_id(team: Team, address: str) -> None:
    answer = team.post("/models", json={"id": "mine", "source": address})
    (error,) = check(answer, 422, "request_invalid")["errors"]
    assert "Did you mean org/name?" in error["detail"]


def test_an_adapter_of_another_team_is_only_said_to_be_an_adapter(
    team: Team, engine: Engine
) -> None:
    adapter = imported(engine)
    other = new_team(team.client, "others", Scope.READ, Scope.WRITE, Scope.INFER)
    answer = other.post("/jobs", json={**job_body(other.dataset()), "model": adapter})
    (error,) = check(answer, 422, "request_invalid")["errors"]
    assert "is the id of an adapter" in error["detail"]
    assert MODEL not in error["detail"]


@pytest.mark.parametrize("kind", ["job", "ds"])
def test_ids_of_jobs_and_datasets_as_model_say_what_they_are(team: Team, kind: str) -> None:
    name = team.job()["id"] if kind == "job" else team.dataset()
    answer = team.post("/jobs", json={**job_body(team.dataset()), "model": name})
    (error,) = check(answer, 422, "request_invalid")["errors"]
    assert ("is a job on the model" if kind == "job" else "id of a dataset") in error["detail"]


@pytest.mark.parametrize("path", ["/models/{}", "/models/{}/layers"])
def test_a_model_that_is_not_there_is_answered_with_the_nearest_ids(team: Team, path: str) -> None:
    answer = team.get(path.format(f"{MODEL}x"))
    detail = check(answer, 404, "not_found")["detail"]
    assert detail.startswith(f"There is no model '{MODEL}x'. Did you mean {MODEL}?")


def test_a_name_that_is_not_allowed_answers_with_the_nearest_ids(team: Team) -> None:
    last = MODEL.rpartition("/")[2]
    answer = team.post("/jobs", json={**job_body(team.dataset()), "model": f"elsewhere/{last}x"})
    (error,) = check(answer, 422, "request_invalid")["errors"]
    assert error["code"] == "model_not_allowed"
    assert f"Did you mean {MODEL}?" in error["detail"]


def test_without_a_live_worker_the_answer_says_so_and_does_not_wait(
    team: Team, engine: Engine
) -> None:
    with transaction(engine) as session:
        for worker in workers.live_workers(session):
            workers.remove_worker(session, worker.id)
    started = time.monotonic()
    answer = team.post("/jobs", json={**job_body(team.dataset()), "model": "allowed/new"})
    assert "no worker is live" in check(answer, 409, "model_not_ready")["detail"]
    assert time.monotonic() - started < 20


# --- deleting


def test_a_failed_model_is_deleted_and_forgotten(team: Team, broken: str) -> None:
    assert team.delete(f"/models/{broken}").status_code == 204
    assert team.get(f"/models/{broken}").status_code == 404
    assert team.delete(f"/models/{broken}").status_code == 404


def test_a_model_that_a_job_or_an_adapter_names_is_kept_and_the_answer_names_it(
    team: Team, engine: Engine
) -> None:
    adapter = imported(engine)
    problem = check(team.delete(f"/models/{MODEL}"), 409, "still_referenced")
    assert adapter in problem["detail"]
    job = team.job()["id"]
    problem = check(team.delete(f"/models/{MODEL}"), 409, "still_referenced")
    assert job in problem["detail"]


def test_a_key_that_may_not_write_deletes_no_model(team: Team, broken: str) -> None:
    reader = new_team(team.client, "readers", Scope.READ)
    assert reader.delete(f"/models/{broken}").status_code == 403
    assert team.get(f"/models/{broken}").status_code == 200
