"""The device of a job that named a strategy is the device of the worker that claims it."""

import pytest
import redis
from sqlalchemy import delete
from starlette.testclient import TestClient

from api.services import Services
from store import attempts, workers
from store.database import transaction
from store.models import Worker
from store.queue import TRAINING_QUEUES
from store.settings import Settings
from tests.api.conftest import Team, new_team, opened


def live(services: Services, *queues: str) -> None:
    """Have exactly these queues served, each by a worker of its own."""
    with transaction(services.engine) as session:
        session.execute(delete(Worker))
        for number, queue in enumerate(queues):
            workers.register_worker(
                session, hostname="here", process_id=number, queues=[queue], device=queue
            )


def claim(services: Services, queue: str) -> str | None:
    with transaction(services.engine) as session:
        found = attempts.claim_next(session, queue=queue, worker_id="wrk_1", lease_seconds=60)
    return None if found is None else found.job.id


def test_a_job_waits_for_the_best_device_and_is_bound_when_it_is_claimed(
    team: Team, services: Services
) -> None:
    live(services, "cuda", "cpu")
    job = team.job()
    assert job["device"] == "auto_performance"
    assert job["training"]["batch_size"] == 8
    assert claim(services, "cpu") is None
    live(services, "cpu")
    assert claim(services, "cpu") == job["id"]
    bound = team.get(f"/jobs/{job['id']}").json()
    assert (bound["device"], bound["queue"]["name"]) == ("cpu", "cpu")
    assert bound["training"] == {**job["training"], "batch_size": 4, "precision": "float32"}
    assert "no cuda and no mps here" in bound["device_reason"]
    assert [found["id"] for found in team.get("/jobs?device=cpu").json()["data"]] == [job["id"]]


def test_a_worker_that_comes_after_the_submission_gets_the_job(
    team: Team, services: Services
) -> None:
    job = team.job()["id"]
    live(services, "cpu", "mps")
    assert claim(services, "cpu") is None
    assert claim(services, "mps") == job
    assert team.get(f"/jobs/{job}").json()["device"] == "mps"


def test_settings_that_were_given_are_the_same_on_every_device(
    team: Team, services: Services
) -> None:
    live(services, "cuda")
    given = {"batch_size": 2, "precision": "bfloat16", "checkpoint_every_steps": 3}
    job = team.job(training=given)
    live(services, "cpu")
    claim(services, "cpu")
    bound = team.get(f"/jobs/{job['id']}").json()["training"]
    assert {name: bound[name] for name in given} == given


def test_a_job_in_float16_is_never_claimed_by_a_cpu(team: Team, services: Services) -> None:
    live(services, "cuda", "cpu")
    job = team.job(training={"precision": "float16"})
    assert job["queue"]["name"] == "auto:cuda,mps"
    live(services, "cpu")
    assert claim(services, "cpu") is None
    waiting = team.get(f"/jobs/{job['id']}").json()["queue"]["reason"]
    assert "'cuda' or 'mps'" in waiting
    refused = team.post(
        "/jobs",
        json={
            "model": job["model"],
            "dataset": job["dataset"],
            "training": {"precision": "float16"},
        },
    )
    assert refused.json()["errors"][0]["pointer"] == "/training/precision"


def test_the_plan_says_what_it_assumes_and_that_the_claim_decides(
    team: Team, services: Services
) -> None:
    live(services, "cpu", "mps")
    body = {"model": "tests/tiny-smolvlm", "dataset": team.dataset(), "preset": "smolvlm_fast"}
    plan = team.post("/jobs/plan", json=body).json()
    assert plan["device"] == "mps"
    assert "when the job is claimed; now that is mps" in plan["device_reason"]


def test_only_the_worker_that_may_claim_hears_the_bell(
    settings: Settings, valkey: str, queue_prefix: str
) -> None:
    update = {"broker_url": valkey, "queue_prefix": queue_prefix}
    with opened(settings.model_copy(update=update)) as app, TestClient(app) as client:
        services: Services = app.state.services
        team = new_team(client, "alpha")
        live(services, "cuda", "cpu")
        job = team.job()["id"]
        live(services, "cpu")
        team.job()
        live(services)
        team.job()  # no worker, no bell: messages that no worker reads would pile up
        team.post(f"/jobs/{job}/pause")
        live(services, "mps")
        team.post(f"/jobs/{job}/resume")
        with redis.Redis.from_url(valkey) as broker:
            rung = {key: broker.llen(f"{queue_prefix}{key}") for key in TRAINING_QUEUES}
    assert rung == {"cuda": 1, "cpu": 1, "mps": 1}


@pytest.mark.parametrize("live_queues", [(), ("cuda",), ("cpu",)])
def test_a_card_by_its_number_is_refused_with_the_kind_to_name(
    team: Team, services: Services, live_queues: tuple[str, ...]
) -> None:
    live(services, *live_queues)
    body = {"model": "tests/tiny-smolvlm", "dataset": team.dataset(), "device": "GPU:1"}
    for path in ("/jobs", "/jobs/plan"):
        answer = team.post(path, json={**body, "preset": "smolvlm_fast"})
        assert answer.status_code == 422
        [fault] = answer.json()["errors"]
        assert (fault["pointer"], fault["input"]) == ("/device", "cuda:1")
        assert "give cuda." in fault["detail"]
        assert "CUDA_VISIBLE_DEVICES" in fault["detail"]


def test_a_text_that_is_no_device_is_not_told_of_cards(team: Team, services: Services) -> None:
    live(services, "cuda")
    body = {"model": "tests/tiny-smolvlm", "dataset": team.dataset(), "device": "cuda:x"}
    [fault] = team.post("/jobs", json={**body, "preset": "smolvlm_fast"}).json()["errors"]
    assert "cuda" in fault["detail"]
    assert "cuda:N" not in fault["detail"]


def test_a_plan_for_cuda_says_that_the_card_decides_about_bfloat16(
    team: Team, services: Services
) -> None:
    live(services, "cuda")
    body = {"model": "tests/tiny-smolvlm", "dataset": team.dataset(), "preset": "smolvlm_fast"}
    plan = team.post("/jobs/plan", json=body).json()
    assert plan["training"]["precision"] == "bfloat16"
    assert "a card that only emulates bfloat16" in plan["estimate"]["basis"]
    asked = team.post("/jobs/plan", json={**body, "training": {"precision": "bfloat16"}}).json()
    assert "emulates" not in asked["estimate"]["basis"]
    assert "float16" not in plan["device_reason"]
