import threading
import time
from pathlib import Path

import pytest

from grit_client.client import GritClient
from grit_client.errors import (
    Conflict,
    InvalidInput,
    InvalidRequest,
    JobFailed,
    NotFound,
    ServiceUnavailable,
    ServiceUnreachable,
    Unauthorised,
)
from grit_core.config import (
    LayerSelectionStrategy,
    ModalityConfig,
    ModelGRITConfig,
    get_model_config,
)
from grit_core.config.training import TrainingConfig
from store import base_models, events, lifecycle
from store.database import transaction
from store.keys import Scope
from store.models import JobStatus
from tests.api.conftest import MODEL, job_body, png, row, rows
from tests.grit_client.conftest import Service


def test_a_client_finds_url_and_key_in_the_home(service: Service) -> None:
    with GritClient(home=service.home.folder) as client:
        assert client.base_url == service.url
        assert list(client.list_jobs()) == []


def test_the_key_of_the_home_is_sent_to_no_other_service(service: Service, tmp_path: Path) -> None:
    home = tmp_path / "other"
    home.mkdir()
    (home / "url").write_text("http://127.0.0.1:1\n")
    (home / "key").write_text(service.key)
    with GritClient(service.url, home=home) as client, pytest.raises(Unauthorised):
        list(client.list_jobs())


def test_a_job_goes_from_upload_to_the_list(client: GritClient, service: Service) -> None:
    told: list[tuple[int, int]] = []
    dataset = client.upload_dataset(
        service.rows_file(12), on_progress=lambda sent, total: told.append((sent, total))
    )
    assert dataset["num_rows"] == 12
    assert told[-1][0] == told[-1][1] == len(rows(12))
    plan = client.plan(job_body(dataset["id"]))
    job = client.create_job(job_body(dataset["id"], plan_hash=plan["plan_hash"]))
    assert job["status"] == "queued"
    assert [found["id"] for found in client.list_jobs(status=["queued", "running"])] == [job["id"]]
    assert list(client.list_jobs(status=["failed"])) == []
    assert client.layers(job["id"])["layers"]
    assert client.manifest(job["id"])["plan_hash"] == plan["plan_hash"]
    assert [item["id"] for item in client.list_datasets()] == [dataset["id"]]


def test_moving_a_configuration_to_the_service_changes_one_line(
    client: GritClient, service: Service
) -> None:
    dataset = client.upload_dataset(service.rows_file())["id"]
    config = ModelGRITConfig(
        text=ModalityConfig(
            layer_patterns=["model.text_model.layers.*.self_attn.v_proj"],
            strategy=LayerSelectionStrategy.LAST_N,
            n_layers=2,
            rank=4,
        )
    )
    training = TrainingConfig(epochs=1, learning_rate=1e-3)
    plan = client.plan({"model": MODEL, "dataset": dataset}, config=config, training=training)
    assert [(layer["block"], layer["rank"]) for layer in plan["layers"]] == [(4, 4), (5, 4)]
    assert plan["training"]["learning_rate"] == 1e-3
    inside = client.plan({"model": MODEL, "dataset": dataset, "config": config})
    assert inside["layers"] == plan["layers"]
    preset = client.create_job(
        {"model": MODEL, "dataset": dataset}, config=get_model_config("smolvlm_fast")
    )
    assert preset["plan"] is not None
    assert preset["plan"]["layers"] == 8


def test_pages_are_followed_to_the_last_job(client: GritClient, service: Service) -> None:
    dataset = client.upload_dataset(service.rows_file())["id"]
    made = [
        client.create_job(job_body(dataset, metadata={"n": str(number)}))["id"]
        for number in range(5)
    ]
    found = list(client._pages("/jobs", {"limit": 2}))
    assert [job["id"] for job in found] == made[::-1]
    assert [job["id"] for job in client.list_jobs(metadata={"n": "3"})] == [made[3]]


def test_the_same_idempotency_key_creates_one_job(client: GritClient, service: Service) -> None:
    dataset = client.upload_dataset(service.rows_file())["id"]
    first = client.create_job(job_body(dataset), idempotency_key="once")
    assert client.create_job(job_body(dataset), idempotency_key="once")["id"] == first["id"]
    with pytest.raises(Conflict) as raised:
        client.create_job(job_body(dataset, name="other"), idempotency_key="once")
    assert raised.value.problem.code == "idempotency_key_reused"
    assert len(list(client.list_jobs())) == 1


def test_every_fault_is_in_the_error(client: GritClient, service: Service) -> None:
    dataset = client.upload_dataset(service.rows_file())["id"]
    body = job_body(dataset, eval_fraction=3.5, priority="high", unheard_of=1)
    with pytest.raises(InvalidRequest) as raised:
        client.create_job(body)
    pointers = {fault.pointer for fault in raised.value.problem.faults}
    assert pointers == {"/eval_fraction", "/priority", "/unheard_of"}
    for pointer in pointers:
        assert str(raised.value).count(f"  {pointer[1:]}") == 1
    assert "3.5" in str(raised.value)


def test_a_number_without_a_json_word_is_refused_before_it_is_sent(client: GritClient) -> None:
    with pytest.raises(InvalidInput, match="finite"):
        client.create_job({"model": MODEL, "eval_fraction": float("nan")})


def test_bad_rows_are_named_with_their_line(client: GritClient, service: Service) -> None:
    path = service.folder / "bad.jsonl"
    path.write_bytes(rows(2) + b'{"messages": 5}\n' + b"not json\n")
    with pytest.raises(InvalidRequest) as raised:
        client.upload_dataset(path)
    problem = raised.value.problem
    assert "line 3" in str(raised.value)
    assert "line 4" in str(raised.value)
    report = client.dataset_report(str(problem.document["dataset"]))
    assert {fault["line"] for fault in report["errors"]} == {3, 4}
    kept = client.upload_dataset(path, on_bad_rows="skip")
    assert (kept["num_rows"], kept["num_bad_rows"]) == (2, 2)


def test_verbs_move_a_job_and_illegal_moves_say_what_is_allowed(
    client: GritClient, service: Service
) -> None:
    dataset = client.upload_dataset(service.rows_file())["id"]
    job = client.create_job(job_body(dataset, auto_start=False))["id"]
    assert client.start(job)["status"] == "queued"
    assert client.pause(job)["status"] == "paused"
    assert client.resume(job)["status"] == "queued"
    assert client.cancel(job)["status"] == "cancelled"
    assert client.cancel(job)["status"] == "cancelled"
    with pytest.raises(Conflict) as raised:
        client.pause(job)
    assert raised.value.problem.code == "illegal_transition"
    assert client.retry(job)["status"] == "queued"
    client.cancel(job)
    client.delete_job(job)
    with pytest.raises(NotFound):
        client.get_job(job)


def test_a_wait_ends_when_the_job_changes(client: GritClient, service: Service) -> None:
    dataset = client.upload_dataset(service.rows_file())["id"]
    job = client.create_job(job_body(dataset))["id"]
    states = client.watch(job, timeout_seconds=300)
    assert next(states)["status"] == "queued"

    def cancel_later() -> None:
        time.sleep(0.3)
        with service.client() as other:
            other.cancel(job)

    thread = threading.Thread(target=cancel_later)
    thread.start()
    began = time.monotonic()
    assert [state["status"] for state in states] == ["cancelled"]
    assert time.monotonic() - began < 60
    thread.join()
    with pytest.raises(JobFailed, match="cancelled"):
        client.wait_for(job)


def test_a_wait_has_a_bound(client: GritClient, service: Service) -> None:
    dataset = client.upload_dataset(service.rows_file())["id"]
    job = client.create_job(job_body(dataset))["id"]
    with pytest.raises(TimeoutError, match=r"within 0\.3 s"):
        client.wait_for(job, timeout_seconds=0.3)


def test_a_stream_goes_on_to_the_final_event_without_gaps(
    client: GritClient, service: Service
) -> None:
    dataset = client.upload_dataset(service.rows_file())["id"]
    job = client.create_job(job_body(dataset))["id"]

    def play_a_worker() -> None:
        for number in range(5):
            time.sleep(0.1)
            with transaction(service.services.engine) as session:
                events.append(session, job, "warned", {"number": number})
        with transaction(service.services.engine) as session:
            lifecycle.transition(session, job, to=JobStatus.CANCELLED)

    thread = threading.Thread(target=play_a_worker)
    thread.start()
    streamed = list(client.stream_events(job))
    thread.join()
    assert [event["sequence"] for event in streamed] == list(range(1, len(streamed) + 1))
    assert [event["payload"]["number"] for event in streamed if event["type"] == "warned"] == [
        *range(5)
    ]
    assert streamed == client.events(job)
    assert list(client.stream_events(job, after=len(streamed) - 1)) == streamed[-1:]


def test_a_missing_scope_and_a_wrong_key_are_unauthorised(service: Service) -> None:
    with GritClient(service.url, service.key_with(Scope.READ)) as reader:
        assert list(reader.list_jobs()) == []
        with pytest.raises(Unauthorised) as raised:
            reader.upload_dataset(service.rows_file())
        assert raised.value.problem.status == 403
    with (
        GritClient(service.url, "grit_nobody_nothing") as stranger,
        pytest.raises(Unauthorised),
    ):
        stranger.devices()


def test_a_key_that_is_no_key_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidInput, match="key"):
        GritClient("http://127.0.0.1:1", "two words")


def test_nobody_at_the_address_is_one_error() -> None:
    with GritClient("http://127.0.0.1:1") as client, pytest.raises(ServiceUnreachable):
        client.version()


def test_infer_wants_one_target_and_one_question(client: GritClient) -> None:
    with pytest.raises(InvalidInput, match="exactly one"):
        client.infer("what?")
    with pytest.raises(InvalidInput, match="exactly one"):
        client.infer("what?", job="job_x", model="m")
    with pytest.raises(InvalidInput, match="either"):
        client.infer(model="m")
    with pytest.raises(InvalidInput, match="cannot be read"):
        client.infer("what?", model="m", images=["nowhere.png"])


def test_infer_without_a_broker_is_unavailable_and_not_a_traceback(client: GritClient) -> None:
    with pytest.raises(ServiceUnavailable) as raised:
        client.infer("what?", model=MODEL, images=[png()])
    assert raised.value.problem.status == 503


def test_keys_are_made_listed_and_revoked(client: GritClient, service: Service) -> None:
    made = client.create_key("ci", scopes=["read"])
    with GritClient(service.url, made["key"]) as other:
        assert list(other.list_jobs()) == []
        client.revoke_key(made["id"])
        with pytest.raises(Unauthorised):
            list(other.list_jobs())
    assert made["id"] in {key["id"] for key in client.list_keys()}


def test_a_key_is_rotated_and_both_are_taken_for_a_while(
    client: GritClient, service: Service
) -> None:
    made = client.create_key("ci", scopes=["read"], expires_in_days=2)
    assert made["expires_at"] is not None
    renewed = client.rotate_key(made["id"], overlap_seconds=600)
    for key in (made, renewed):
        with GritClient(service.url, key["key"]) as other:
            assert list(other.list_jobs()) == []
    old = next(key for key in client.list_keys() if key["id"] == made["id"])
    assert old["replaced_by"] == renewed["id"]


def test_a_team_is_shown_and_set(client: GritClient) -> None:
    team = client.own_team()
    assert (team["name"], team["usage"]["open_jobs"]) == ("default", 0)
    changed = client.set_team("default", {"max_open_jobs": 7})
    assert changed["own_limits"]["max_open_jobs"] == 7
    assert client.get_team("default") == changed
    assert list(client.list_teams()) == [changed]
    assert client.set_team("default", {"max_open_jobs": None}) == team


def test_the_catalog_is_readable(client: GritClient) -> None:
    assert "smolvlm_fast" in {preset["name"] for preset in client.presets()}
    assert client.preset("smolvlm_fast")["config"]
    assert [device["name"] for device in client.devices()] == ["cpu"]
    assert MODEL in {model["id"] for model in client.list_models()}
    assert client.get_model(MODEL)["status"] == "ready"
    assert client.model_layers(MODEL)["modalities"]
    assert client.version()["name"] == "grit-service"
    health = client.health()
    assert health["checks"]["database"] == "ok"
    assert client.job_schema()


def test_registering_a_model_that_is_not_there_is_refused_at_once(client: GritClient) -> None:
    with pytest.raises(InvalidRequest) as raised:
        client.register_model("/nowhere/at/all", id="gone")
    assert "/nowhere/at/all" in str(raised.value)


def test_registering_a_model_that_fails_its_probe_gives_the_reason(
    client: GritClient, service: Service, tmp_path: Path
) -> None:
    engine = service.services.engine

    def refuse() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with transaction(engine) as session:
                if base_models.find(session, "torn") is not None:
                    base_models.save_failure(
                        session, id="torn", code="model_unavailable", message="It lacks 3 tensors."
                    )
                    return

    (tmp_path / "config.json").write_text("{}")
    worker = threading.Thread(target=refuse)
    worker.start()
    with pytest.raises(InvalidInput, match="'torn' cannot be used: It lacks 3 tensors"):
        client.register_model(tmp_path, id="torn")
    worker.join()
    client.delete_model("torn")
    with pytest.raises(NotFound):
        client.get_model("torn")


def test_registering_waits_no_longer_than_told(client: GritClient, service: Service) -> None:
    folder = service.folder / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TimeoutError, match="still being read"):
        client.register_model(folder, wait_seconds=0.2)


def test_a_dataset_is_looked_at_and_deleted(client: GritClient, service: Service) -> None:
    path = service.folder / "one.jsonl"
    path.write_bytes(rows(1))
    dataset = client.upload_dataset(path, name="one")["id"]
    assert client.get_dataset(dataset)["name"] == "one"
    client.delete_dataset(dataset)
    with pytest.raises(NotFound):
        client.get_dataset(dataset)
    assert row("x")["messages"]
