"""Jobs over HTTP: plan, create, list, wait, move."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from api.services import Services
from store import attempts, events, jobs
from store.attempts import Failure
from store.database import transaction
from store.models import Team as TeamRow
from tests.api.conftest import MODEL, Team, job_body
from tests.builders import end_wait


@pytest.fixture
def api_database_url(database_url: str) -> str:
    """Each kind of database."""
    return database_url


def claim(services: Services) -> Any:
    with transaction(services.engine) as session:
        return attempts.claim_next(session, queue="cpu", worker_id="wrk_1", lease_seconds=60)


def test_a_plan_names_every_layer_and_creates_nothing(team: Team) -> None:
    answer = team.post("/jobs/plan", json=job_body(team.dataset()))
    assert answer.status_code == 200, answer.text
    plan = answer.json()
    modalities = [layer["modality"] for layer in plan["layers"]]
    assert modalities == ["vision"] * 3 + ["text"] * 4 + ["cross_modal"]
    assert all(layer["reason"] for layer in plan["layers"])
    assert plan["training"]["batch_size"] != "auto"
    assert plan["estimate"]["total_steps"] > 0
    assert team.get("/jobs").json() == {"data": [], "next": None}


def test_a_created_job_is_queued_and_says_all_it_was_resolved_to(team: Team) -> None:
    dataset = team.dataset()
    body = job_body(dataset, name="grey", metadata={"a": "b"}, training={"epochs": 1})
    answer = team.post("/jobs", json=body)
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert answer.headers["Location"] == f"/jobs/{job['id']}"
    assert job["status"] == "queued"
    assert job["queue"] == {"name": "auto:cuda,mps,cpu", "position": 1, "reason": None}
    assert job["device"] == "auto_performance"
    assert (job["model"], job["dataset"], job["metadata"]) == (MODEL, dataset, {"a": "b"})
    assert job["plan"]["layers"] == 8
    assert "cpu" in job["device_reason"]
    assert team.get(f"/jobs/{job['id']}").json() == job


def test_the_same_idempotency_key_gives_the_same_job(team: Team) -> None:
    body = job_body(team.dataset())
    headers = {"Idempotency-Key": "once"}
    first = team.post("/jobs", json=body, headers=headers)
    second = team.post("/jobs", json=body, headers=headers)
    assert second.status_code == 201
    assert second.json()["id"] == first.json()["id"]
    assert second.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    other = team.post("/jobs", json={**body, "name": "x"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_key_reused")


def test_an_idempotency_key_belongs_to_its_team(join: Callable[..., Team]) -> None:
    first, second = join("alpha"), join("beta")
    headers = {"Idempotency-Key": "once"}
    one = first.post("/jobs", json=job_body(first.dataset()), headers=headers)
    two = second.post("/jobs", json=job_body(second.dataset()), headers=headers)
    assert two.status_code == 201
    assert one.json()["id"] != two.json()["id"]


def test_an_accepted_plan_hash_is_kept_and_another_is_refused(team: Team) -> None:
    body = job_body(team.dataset())
    seen = team.post("/jobs/plan", json=body).json()["plan_hash"]
    assert team.post("/jobs", json={**body, "plan_hash": seen}).status_code == 201
    changed = {**body, "plan_hash": seen, "config": {"text": {"rank": 4}}}
    answer = team.post("/jobs", json=changed)
    assert (answer.status_code, answer.json()["code"]) == (409, "plan_changed")


def test_a_preset_is_overlaid_field_by_field(team: Team) -> None:
    answer = team.post(
        "/jobs/plan", json=job_body(team.dataset(), config={"text": {"n_layers": 2, "rank": 4}})
    )
    layers = [layer for layer in answer.json()["layers"] if layer["modality"] == "text"]
    assert [(layer["block"], layer["rank"]) for layer in layers] == [(4, 4), (5, 4)]


def test_a_job_without_auto_start_waits_for_its_start(team: Team) -> None:
    job = team.job(auto_start=False)
    assert job["status"] == "created"
    started = team.post(f"/jobs/{job['id']}/start")
    assert started.json()["status"] == "queued"


def test_verbs_are_idempotent_and_illegal_moves_name_what_is_allowed(team: Team) -> None:
    job = team.job()["id"]
    assert team.post(f"/jobs/{job}/pause").json()["status"] == "paused"
    assert team.post(f"/jobs/{job}/pause").json()["status"] == "paused"
    assert team.post(f"/jobs/{job}/resume").json()["status"] == "queued"
    assert team.post(f"/jobs/{job}/cancel").json()["status"] == "cancelled"
    assert team.post(f"/jobs/{job}/cancel").json()["status"] == "cancelled"
    refused = team.post(f"/jobs/{job}/pause")
    assert (refused.status_code, refused.json()["code"]) == (409, "illegal_transition")
    assert refused.json()["allowed"] == ["queued"]
    assert team.post(f"/jobs/{job}/retry").json()["status"] == "queued"


def test_only_an_ended_job_can_be_deleted(team: Team) -> None:
    job = team.job()["id"]
    assert team.delete(f"/jobs/{job}").status_code == 409
    team.post(f"/jobs/{job}/cancel")
    assert team.delete(f"/jobs/{job}").status_code == 204
    assert team.get(f"/jobs/{job}").status_code == 404


def test_a_list_is_paged_and_filtered(team: Team) -> None:
    dataset = team.dataset()
    made = [team.job(dataset=dataset, metadata={"n": str(n)})["id"] for n in range(5)]
    first = team.get("/jobs?limit=2").json()
    second = team.get(f"/jobs?limit=2&cursor={first['next']}").json()
    third = team.get(f"/jobs?limit=2&cursor={second['next']}").json()
    found = [job["id"] for page in (first, second, third) for job in page["data"]]
    assert found == made[::-1]
    assert third["next"] is None
    team.post(f"/jobs/{made[0]}/cancel")
    by_status = team.get("/jobs?status=cancelled&status=failed").json()["data"]
    assert [job["id"] for job in by_status] == [made[0]]
    by_metadata = team.get("/jobs", params={"metadata[n]": "3"}).json()["data"]
    assert [job["id"] for job in by_metadata] == [made[3]]
    assert team.get("/jobs?device=cuda").json()["data"] == []


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "cursor=%00",
        "cursor=forged",
        "status=done",
        "created_after=yesterday",
        "created_after=2026-01-01T00:00:00",
        "metadata[]=x",
        "metadata[a]=%00",
        "model=%00",
        "device=a%0Ab",
    ],
)
def test_a_bad_filter_is_refused(team: Team, query: str) -> None:
    answer = team.get(f"/jobs?{query}")
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_an_unchanged_job_is_not_sent_again(team: Team) -> None:
    job = team.job()["id"]
    first = team.get(f"/jobs/{job}")
    tag = first.headers["ETag"]
    again = team.get(f"/jobs/{job}", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    team.post(f"/jobs/{job}/pause")
    changed = team.get(f"/jobs/{job}", headers={"If-None-Match": tag})
    assert changed.status_code == 200


def test_a_long_poll_answers_as_soon_as_something_changes(team: Team) -> None:
    job = team.job()["id"]
    timer = threading.Timer(0.4, lambda: team.post(f"/jobs/{job}/pause"))
    timer.start()
    answer = team.get(f"/jobs/{job}?wait=20")
    timer.join()
    assert answer.json()["status"] == "paused"
    assert answer.elapsed.total_seconds() < 5


def test_a_long_poll_for_an_ended_job_answers_at_once(team: Team) -> None:
    job = team.job()["id"]
    team.post(f"/jobs/{job}/cancel")
    answer = team.get(f"/jobs/{job}?wait=20")
    assert answer.json()["status"] == "cancelled"
    assert answer.elapsed.total_seconds() < 2


def test_a_job_without_a_live_worker_says_why_it_waits(team: Team, services: Services) -> None:
    job = team.job()["id"]
    with transaction(services.engine) as session:
        session.execute(text("DELETE FROM workers"))
    waiting = team.get(f"/jobs/{job}").json()
    assert "No live worker" in waiting["queue"]["reason"]
    assumed = team.job()
    assert "none is live, cpu is assumed" in assumed["device_reason"]
    named = team.job(device="cpu")
    assert named["device"] == "cpu"
    assert "assumed" in named["device_reason"]


def test_metrics_come_as_columns_and_as_csv(team: Team, services: Services) -> None:
    job = team.job()["id"]
    claimed = claim(services)
    told = [
        {
            "type": "step_completed",
            "step": step,
            "total_steps": 30,
            "epoch": step / 10,
            "train_loss": 1 / step if step != 3 else float("nan"),
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "num_tokens": 10,
            "tokens_per_second": 5.0,
            "elapsed_seconds": float(step),
        }
        for step in range(1, 31)
    ]
    told.append({"type": "evaluated", "step": 7, "eval_loss": 0.5})
    observed = {"model.x": {"effective_rank": 3.0, "fisher_energy": 1.0, "spectrum": [1.0]}}
    told.append({
        "type": "curvature_observed",
        "step": 10,
        "layers": observed,
        "modalities": {"text": {"effective_rank": 3.0, "fisher_energy": 1.0}},
    })
    with transaction(services.engine) as session:
        events.record_progress(session, job, claimed.attempt, told)
    found = team.get(f"/jobs/{job}/metrics").json()
    assert found["steps"] == 30
    assert found["series"]["step"] == list(range(1, 31))
    assert found["series"]["train_loss"][2] is None
    assert found["series"]["eval_loss"][6] == 0.5
    thinned = team.get(f"/jobs/{job}/metrics?max_points=5").json()["series"]["step"]
    assert thinned == [1, 7, 13, 19, 25, 30]
    table = team.get(f"/jobs/{job}/metrics", headers={"Accept": "text/csv"}).text.splitlines()
    assert table[0].startswith("step,epoch,train_loss")
    assert len(table) == 31
    progress = team.get(f"/jobs/{job}").json()["progress"]
    assert (progress["step"], progress["total_steps"], progress["percent"]) == (30, 30, 100.0)


def test_layers_checkpoints_and_the_manifest_belong_to_the_job(team: Team) -> None:
    job = team.job()["id"]
    layers = team.get(f"/jobs/{job}/layers").json()["layers"]
    assert len(layers) == 8
    assert layers[0]["history"] == []
    assert team.get(f"/jobs/{job}/checkpoints").json() == {"job": job, "data": []}
    manifest = team.get(f"/jobs/{job}/manifest").json()
    assert manifest["dataset"]["sha256"]
    assert manifest["model"]["inventory_hash"]
    assert manifest["request"]["preset"] == "smolvlm_fast"
    assert manifest["seed"] == 0


def observation(step: int, layer: str, **projected: Any) -> dict[str, Any]:
    """What an attempt tells of the curvature of a layer, with projection or without."""
    curvature = {"effective_rank": 3.0, "fisher_energy": 1.0}
    budget = {"requested_budget": 8, "effective_budget": 9, "predicted_kl": 2e-4}
    return {
        "type": "curvature_observed",
        "step": step,
        "layers": {layer: {**curvature, "spectrum": [2.0, 1.0], **projected}},
        "modalities": {"text": {**curvature, **(budget if projected else {})}},
    }


def test_layers_and_metrics_show_the_budget_where_it_was_observed(
    team: Team, services: Services
) -> None:
    job = team.job()["id"]
    claimed = claim(services)
    layer = "model.text_model.layers.4.self_attn.v_proj"
    with transaction(services.engine) as session:  # as versions before projection told it
        events.record_progress(session, job, claimed.attempt, [observation(1, layer)])
    before = {each["name"]: each for each in team.get(f"/jobs/{job}/layers").json()["layers"]}
    assert before[layer]["effective_rank"] == 3.0
    assert (before[layer]["active"], before[layer]["predicted_kl"]) == (None, None)
    names = team.get(f"/jobs/{job}/metrics").json()["series"].keys()
    assert "effective_rank.text" in names
    assert not [name for name in names if "budget" in name or "predicted_kl" in name]

    told = [observation(5, layer, active=9, predicted_kl=0.0), observation(9, layer, active=7)]
    told[1]["layers"][layer]["predicted_kl"] = 2e-4
    with transaction(services.engine) as session:
        events.record_progress(session, job, claimed.attempt, told)
    layers = {each["name"]: each for each in team.get(f"/jobs/{job}/layers").json()["layers"]}
    assert (layers[layer]["active"], layers[layer]["predicted_kl"]) == (7, 2e-4)
    assert layers[layer]["compacted_rank"] is None
    assert [each.get("active") for each in layers[layer]["history"]] == [None, 9, 7]
    assert {each["active"] for name, each in layers.items() if name != layer} == {None}
    series = team.get(f"/jobs/{job}/metrics").json()["series"]
    assert series["step"] == [1, 5, 9]
    assert series["requested_budget.text"] == [None, 8, 8]
    assert series["effective_budget.text"] == [None, 9, 9]
    assert series["predicted_kl.text"] == [None, 2e-4, 2e-4]
    header = team.get(f"/jobs/{job}/metrics", headers={"Accept": "text/csv"}).text.splitlines()[0]
    assert "effective_budget.text" in header.split(",")


def test_a_retention_dataset_is_frozen_in_the_job_and_its_losses_are_in_the_result(
    team: Team, services: Services
) -> None:
    own, kept = team.dataset(), team.dataset(4)
    job = team.job(dataset=own, retention_dataset=kept)
    assert (job["retention_dataset"], job["result"]) == (kept, None)
    manifest = team.get(f"/jobs/{job['id']}/manifest").json()
    assert manifest["retention_dataset"]["id"] == kept
    assert manifest["retention_dataset"]["num_rows"] == 4
    assert (manifest["dataset"]["id"], manifest["eval_dataset"]) == (own, None)
    refused = team.delete(f"/datasets/{kept}")
    assert (refused.status_code, refused.json()["code"]) == (409, "still_referenced")
    claimed = claim(services)
    retention = {"dataset": kept, "loss_before": 1.5, "loss_after": 1.75}
    told = {"type": "retention_evaluated", "step": 3, "when": "after", "loss": 1.75}
    with transaction(services.engine) as session:
        events.record_progress(session, job["id"], claimed.attempt, [told])
        attempts.complete(
            session,
            job_id=job["id"],
            attempt=claimed.attempt,
            adapter=attempts.NewAdapter(id="adp_1", prefix="adapters/adp_1"),
            result={"final_loss": 0.5, "retention": retention, "compaction": None},
        )
    ended = team.get(f"/jobs/{job['id']}").json()
    assert ended["result"]["retention"] == retention
    assert ended["result"]["compaction"] is None
    page = team.get(f"/jobs/{job['id']}/events").json()["data"]
    [event] = [each for each in page if each["type"] == "retention_evaluated"]
    assert event["payload"] == {"step": 3, "when": "after", "loss": 1.75}


def test_a_result_of_before_retention_and_compaction_is_read(
    team: Team, services: Services
) -> None:
    job = team.job()["id"]
    claimed = claim(services)
    with transaction(services.engine) as session:
        attempts.complete(
            session,
            job_id=job,
            attempt=claimed.attempt,
            adapter=attempts.NewAdapter(id="adp_1", prefix="adapters/adp_1"),
            result={"final_loss": 0.5, "effective_rank": {"text": 2.0}},
        )
    result = team.get(f"/jobs/{job}").json()["result"]
    assert (result["retention"], result["compaction"]) == (None, None)
    assert result["effective_rank"] == {"text": 2.0}


def test_the_quota_of_open_jobs_is_told(team: Team, services: Services) -> None:
    dataset = team.dataset()
    with transaction(services.engine) as session:
        session.get_one(TeamRow, team.name).max_open_jobs = 1
    team.job(dataset=dataset)
    answer = team.post("/jobs", json=job_body(dataset))
    assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
    assert int(answer.headers["Retry-After"]) > 0
    with transaction(services.engine) as session:
        assert len(jobs.list_jobs(session, team=team.name).rows) == 1


def test_every_execution_tells_why_it_ended(team: Team, services: Services) -> None:
    job_id = team.job()["id"]
    assert team.get(f"/jobs/{job_id}/attempts").json() == {"job": job_id, "data": []}
    for number, (code, retryable) in enumerate((("killed", True), ("diverged", False)), start=1):
        claimed = claim(services)
        failure = Failure(code=code, message=f"It ended {number}.", retryable=retryable)
        with transaction(services.engine) as session:
            attempts.fail(session, job_id=job_id, attempt=number, failure=failure)
        assert claimed.attempt == number
        if retryable:
            end_wait(services.engine, job_id)

    data = team.get(f"/jobs/{job_id}/attempts").json()["data"]
    told = [(each["number"], each["outcome"], each["failure"]["code"]) for each in data]
    assert told == [(1, "failed", "killed"), (2, "failed", "diverged")]
    assert [each["failure"]["message"] for each in data] == ["It ended 1.", "It ended 2."]
    assert all(each["started_at"] and each["ended_at"] for each in data)
    assert team.get(f"/jobs/{job_id}").json()["links"]["attempts"] == f"/jobs/{job_id}/attempts"
