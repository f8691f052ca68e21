"""Compressing an adapter over HTTP; the worker's part is played by writing rows."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from api.services import Services
from store import adapters, attempts, jobs
from store.attempts import NewAdapter
from store.database import transaction
from store.ids import new_id
from store.keys import Scope
from store.models import AdapterOrigin, DatasetStatus, Job
from store.models import Dataset as DatasetRow
from tests.api.conftest import MODEL, Team, job_body

RANKS = {"model.text_model.layers.4.self_attn.v_proj": 3}
COMPACTION = {
    "ranks": RANKS,
    "parameters_before": 328_704,
    "parameters_after": 90_000,
    "predicted_kl": 0.0009,
    "measured_kl": 0.0008,
    "max_kl": 0.001,
    "eval_loss_before": 0.5,
    "eval_loss_after": 0.501,
}


@pytest.fixture
def api_database_url(database_url: str) -> str:
    """Each kind of database."""
    return database_url


def run(services: Services, *, result: dict[str, Any] | None = None, **details: Any) -> str:
    """Play the worker of the next job: it succeeds at once. Returns the adapter's id."""
    adapter = new_id("adp")
    with transaction(services.engine) as session:
        claim = attempts.claim_next(session, queue="cpu", worker_id="wrk_1", lease_seconds=60)
        assert claim is not None
        attempts.complete(
            session,
            job_id=claim.job.id,
            attempt=claim.attempt,
            adapter=NewAdapter(
                id=adapter,
                prefix=f"adapters/{adapter}",
                sha256="a" * 64,
                trainable_parameters=328_704,
                details=details,
            ),
            result={"final_loss": 0.5, **(result or {})},
        )
    return adapter


@pytest.fixture
def trained(team: Team, services: Services) -> tuple[dict[str, Any], str]:
    """A training job with rows to evaluate on, and its adapter."""
    job = team.job(eval_dataset=team.dataset(4), training={"batch_size": 2, "seed": 7})
    return job, run(services)


def compress(team: Team, adapter: str, **fields: Any) -> Any:
    headers = fields.pop("headers", {})
    return team.post(f"/adapters/{adapter}/compress", json=fields, headers=headers)


def faults(answer: Any) -> list[tuple[str, str | None]]:
    return [(fault["code"], fault.get("pointer")) for fault in answer.json()["errors"]]


def test_a_compression_is_a_job_with_the_adapters_own_plan_and_settings(
    team: Team, trained: tuple[dict[str, Any], str]
) -> None:
    source_job, source = trained
    answer = compress(team, source, name="small")
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["Location"] == f"/jobs/{job['id']}"
    assert (job["kind"], job["status"], job["name"]) == ("compression", "queued", "small")
    assert job["source_adapter"] == source
    assert job["compression"] == {"max_kl": 1e-05, "num_rows": 256}
    for field in ("model", "dataset", "eval_dataset", "preset", "config", "plan"):
        assert job[field] == source_job[field], field
    assert job["training"]["seed"] == 7
    assert job["training"]["batch_size"] == 2
    assert job["queue"]["position"] == 1
    assert team.get(f"/jobs/{job['id']}").json() == job
    assert [each["kind"] for each in team.get("/jobs").json()["data"]] == [
        "compression",
        "training",
    ]
    assert (source_job["kind"], source_job["source_adapter"], source_job["compression"]) == (
        "training",
        None,
        None,
    )


def test_its_result_is_an_adapter_with_a_parent_and_what_was_cut(
    team: Team, services: Services, trained: tuple[dict[str, Any], str]
) -> None:
    _, source = trained
    job = compress(team, source, max_kl=0.002, num_rows=10).json()["id"]
    made = run(services, result={"compaction": COMPACTION, "final_loss": None}, ranks=RANKS)
    ended = team.get(f"/jobs/{job}").json()
    assert ended["status"] == "succeeded"
    assert ended["result"]["adapter"] == made
    assert ended["result"]["compaction"] == COMPACTION
    assert ended["result"]["retention"] is None
    adapter = team.get(f"/adapters/{made}").json()
    assert (adapter["origin"], adapter["parent"], adapter["job"]) == ("compression", source, job)
    assert adapter["ranks"] == RANKS
    assert adapter["links"]["parent"] == f"/adapters/{source}"
    assert team.get(f"/adapters/{source}").json()["ranks"] is None
    layers = {each["name"]: each for each in team.get(f"/jobs/{job}/layers").json()["layers"]}
    assert {name: each["compacted_rank"] for name, each in layers.items() if name in RANKS} == RANKS
    assert {each["compacted_rank"] for name, each in layers.items() if name not in RANKS} == {None}
    manifest = team.get(f"/jobs/{job}/manifest").json()
    assert manifest["kind"] == "compression"
    assert manifest["source_adapter"] == {"id": source, "sha256": "a" * 64}
    assert manifest["request"] == {
        "adapter": source,
        "max_kl": 0.002,
        "dataset": None,
        "num_rows": 10,
        "name": None,
    }


def test_a_compressed_adapter_is_compressed_on_what_it_was_once_trained_on(
    team: Team, services: Services, trained: tuple[dict[str, Any], str]
) -> None:
    source_job, source = trained
    other = team.dataset(5)
    first = compress(team, source, dataset=other).json()
    assert first["dataset"] == other
    second = compress(team, run(services)).json()
    assert (second["dataset"], second["plan"]) == (source_job["dataset"], source_job["plan"])


def test_without_its_job_an_adapters_own_manifest_says_how_it_was_made(
    team: Team, services: Services, trained: tuple[dict[str, Any], str]
) -> None:
    source_job, source = trained
    with transaction(services.engine, read_only=True) as session:
        row = jobs.get_job(session, source_job["id"], team=team.name)
    manifest = {"plan": row.plan, "config": row.config, "training": row.training}
    services.objects.put_bytes(f"adapters/{source}/grit.json", json.dumps(manifest).encode())
    assert team.delete(f"/jobs/{source_job['id']}").status_code == 204
    unknown = compress(team, source)
    assert unknown.status_code == 422
    assert faults(unknown) == [("dataset_unknown", "/dataset")]
    assert "name one in `dataset`" in unknown.json()["detail"]
    job = compress(team, source, dataset=source_job["dataset"]).json()
    assert job["plan"] == source_job["plan"]
    assert (job["config"], job["training"]) == (source_job["config"], source_job["training"])
    assert job["eval_dataset"] is None


def test_an_adapter_that_was_not_made_here_is_compressed_with_the_defaults(
    team: Team, services: Services
) -> None:
    with transaction(services.engine) as session:
        imported = adapters.create_adapter(
            session, team=team.name, origin=AdapterOrigin.IMPORT, model=MODEL, prefix="adapters/i"
        ).id
    answer = compress(team, imported, dataset=team.dataset())
    assert answer.status_code == 202, answer.text
    job = answer.json()
    nothing = {"plan_hash": "", "layers": 0, "trainable_parameters": 0, "warnings": []}
    assert job["plan"] == nothing
    assert "auto" not in job["training"].values()
    assert team.get(f"/jobs/{job['id']}/layers").json()["layers"] == []


@pytest.mark.parametrize("content", [b"{}", b"not JSON", b'{"plan": {}, "config": 3}'])
def test_an_adapter_whose_manifest_cannot_be_read_is_refused(
    team: Team, services: Services, content: bytes
) -> None:
    with transaction(services.engine) as session:
        damaged = adapters.create_adapter(
            session, team=team.name, origin=AdapterOrigin.JOB, model=MODEL, prefix="adapters/d"
        ).id
    services.objects.put_bytes("adapters/d/grit.json", content)
    answer = compress(team, damaged, dataset=team.dataset())
    assert (answer.status_code, answer.json()["code"]) == (422, "adapter_not_compressible")
    assert team.get("/jobs").json()["data"] == []


def test_half_precision_becomes_whole_where_the_device_has_none(
    team: Team, services: Services, trained: tuple[dict[str, Any], str]
) -> None:
    source_job, source = trained
    with transaction(services.engine) as session:
        row = session.get_one(Job, source_job["id"])
        row.training = {**row.training, "precision": "float16"}
    assert compress(team, source).json()["training"]["precision"] == "float32"


@pytest.mark.parametrize(
    ("fields", "code", "pointer"),
    [
        ({"max_kl": 0}, "out_of_range", "/max_kl"),
        ({"max_kl": 10.5}, "out_of_range", "/max_kl"),
        ({"max_kl": "0.1"}, "type_invalid", "/max_kl"),
        ({"num_rows": 0}, "out_of_range", "/num_rows"),
        ({"num_rows": 10_000_000}, "out_of_range", "/num_rows"),
        ({"num_rows": 2.5}, "type_invalid", "/num_rows"),
        ({"name": "a\nb"}, "value_invalid", "/name"),
        ({"max_rank": 3}, "field_unknown", "/max_rank"),
        ({"dataset": "ds_unknown"}, "dataset_not_found", "/dataset"),
    ],
)
def test_a_bad_field_of_a_compression_is_named_with_its_pointer(
    team: Team,
    trained: tuple[dict[str, Any], str],
    fields: dict[str, Any],
    code: str,
    pointer: str,
) -> None:
    answer = compress(team, trained[1], **fields)
    assert answer.status_code == 422, answer.text
    assert faults(answer) == [(code, pointer)]


def test_a_compression_cannot_name_another_teams_dataset(
    join: Callable[..., Team], trained: tuple[dict[str, Any], str]
) -> None:
    foreign = join("beta").dataset()
    answer = compress(join("alpha"), trained[1], dataset=foreign)
    assert faults(answer) == [("dataset_not_found", "/dataset")]


def test_a_dataset_that_is_not_ready_is_a_conflict(
    team: Team, services: Services, trained: tuple[dict[str, Any], str]
) -> None:
    other = team.dataset(3)
    with transaction(services.engine) as session:
        session.get_one(DatasetRow, other).status = DatasetStatus.VALIDATING
    answer = compress(team, trained[1], dataset=other)
    assert (answer.status_code, answer.json()["code"]) == (409, "dataset_not_ready")


def test_the_same_key_gives_the_same_compression_of_the_same_adapter(
    team: Team, services: Services, trained: tuple[dict[str, Any], str]
) -> None:
    _, source = trained
    team.job()
    other = run(services)
    headers = {"Idempotency-Key": "once"}
    first = compress(team, source, headers=headers)
    second = compress(team, source, headers=headers)
    assert (second.status_code, second.json()["id"]) == (202, first.json()["id"])
    assert second.headers["Idempotent-Replayed"] == "true"
    assert second.headers["Location"] == first.headers["Location"]
    for answer in (
        compress(team, source, max_kl=0.5, headers=headers),
        compress(team, other, headers=headers),
    ):
        assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_key_reused")
    # The key of another route is another key.
    assert team.post("/jobs", json=job_body(team.dataset()), headers=headers).status_code == 201


def test_an_adapter_stays_while_it_is_to_be_compressed(
    team: Team, trained: tuple[dict[str, Any], str]
) -> None:
    _, source = trained
    job = compress(team, source).json()["id"]
    refused = team.delete(f"/adapters/{source}")
    assert (refused.status_code, refused.json()["code"]) == (409, "still_referenced")
    assert job in refused.json()["detail"]
    assert team.post(f"/jobs/{job}/cancel").json()["status"] == "cancelled"
    assert team.delete(f"/adapters/{source}").status_code == 204
    ended = team.get(f"/jobs/{job}").json()
    assert (ended["source_adapter"], ended["status"]) == (None, "cancelled")
    assert team.get(f"/jobs/{job}/manifest").json()["source_adapter"] == {
        "id": source,
        "sha256": None,
    }
    gone = team.post(f"/jobs/{job}/retry")
    assert (gone.status_code, gone.json()["code"]) == (404, "not_found")
    assert source in gone.json()["detail"]


def test_a_waiting_compression_is_paused_and_resumed(
    team: Team, trained: tuple[dict[str, Any], str]
) -> None:
    job = compress(team, trained[1]).json()["id"]
    assert team.post(f"/jobs/{job}/pause").json()["status"] == "paused"
    assert team.post(f"/jobs/{job}/resume").json()["status"] == "queued"


def test_compressing_needs_the_scope_of_creating_jobs(
    join: Callable[..., Team], trained: tuple[dict[str, Any], str]
) -> None:
    reader = join("alpha", Scope.READ, Scope.INFER)
    answer = compress(reader, trained[1])
    assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing")
