"""The process itself: health, readiness, measures, headers, logs, the key file, start-up."""

import json
import math
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import delete, update
from starlette.testclient import TestClient

from api.app import create_app
from api.services import Services
from store import attempts
from store.database import transaction
from store.keys import Scope
from store.models import JobStatus, Worker
from store.queue import AUTO_QUEUES, INFERENCE_QUEUES, TRAINING_QUEUES
from store.settings import Settings
from store.workers import register_worker
from tests.api.conftest import Team, new_team, opened
from tests.ports import reserve_port
from tests.run_guard import run_mark
from tests.services import S3


def test_health_asks_nothing(client: TestClient) -> None:
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_readiness_names_every_part_and_accepts_jobs_without_a_broker(client: TestClient) -> None:
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["checks"] == {
        "database": "ok",
        "objects": "ok",
        "storage": "ok",
        "broker": "does not answer",
        "training": "ok",
        "inference": "no live worker answers requests",
    }


def test_a_database_that_does_not_answer_is_unready_and_unavailable(tmp_path: Path) -> None:
    url = "postgresql+psycopg://nobody@127.0.0.1:1/none"
    settings = Settings(home=tmp_path, database_url=url, broker_url="redis://127.0.0.1:1/0")
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "unready")
        assert ready.json()["queues"] == []
        answer = client.get("/jobs", headers={"Authorization": "Bearer grit_x_y"})
        if answer.status_code != 401:  # a malformed key needs no database to be refused
            assert answer.status_code == 503
        key = f"grit_{'0' * 12}_{'x' * 43}"
        answer = client.get("/jobs", headers={"Authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        assert answer.headers["Retry-After"]
        assert "127.0.0.1" not in answer.text
        assert client.get("/healthz").status_code == 200


def test_a_database_without_tables_is_unready_with_the_command_that_makes_them(
    tmp_path: Path,
) -> None:
    settings = Settings(home=tmp_path, broker_url="redis://127.0.0.1:1/0")
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "unready")
        assert "run `python -m store migrate`" in ready.json()["checks"]["database"]
        key = f"grit_{'0' * 12}_{'x' * 43}"
        answer = client.get("/jobs", headers={"Authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")


def test_a_missing_bucket_is_unready(sqlite_url: str, s3: S3, tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path,
        database_url=sqlite_url,
        objects_url="s3://absent/x",
        s3_endpoint=s3.endpoint,
        s3_access_key_id=s3.access_key_id,
        s3_secret_access_key=s3.secret_access_key,  # type: ignore[arg-type] # pydantic makes a secret of it
    )
    with TestClient(create_app(settings)) as client:
        ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["checks"]["objects"] == "does not answer"


def test_a_part_that_is_silent_is_unready_soon_however_many_ask(
    sqlite_url: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        port = silent.getsockname()[1]
        settings = Settings(
            home=tmp_path,
            database_url=sqlite_url,
            objects_url="s3://bucket/here",
            s3_endpoint=f"http://127.0.0.1:{port}",
            s3_access_key_id="key",
            s3_secret_access_key=SecretStr("secret"),
        )
        began = time.monotonic()
        with TestClient(create_app(settings)) as client, ThreadPoolExecutor(60) as pool:
            answers = list(pool.map(lambda _: client.get("/readyz"), range(60)))
        # Alone, the store would be waited for as long as it may be silent in an upload.
        assert time.monotonic() - began < settings.objects_silence_seconds
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json()["checks"]["objects"] for answer in answers} == {"does not answer"}
    assert {answer.json()["checks"]["database"] for answer in answers} == {"ok"}


def test_measures_count_requests_and_jobs_without_names(team: Team) -> None:
    job = team.job()["id"]
    team.get(f"/jobs/{job}")
    text = team.client.get("/metrics").text
    assert 'grit_jobs{queue="auto:cuda,mps,cpu",status="queued"} 1.0' in text
    assert 'grit_live_workers{device="cpu",kind="training",queue="cpu"} 1.0' in text
    assert 'route="/jobs/{job_id}"' in text
    assert job not in text
    assert team.name not in text


def measured(client: TestClient) -> dict[str, float]:
    """Read the gauges and counters as Prometheus would."""
    text = client.get("/metrics").text
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_there_is_none_of_is_measured_as_0_and_what_is_not_known_as_nan(
    client: TestClient, services: Services
) -> None:
    with transaction(services.engine) as session:
        session.execute(delete(Worker))
    found = measured(client)
    for queue in (*TRAINING_QUEUES, *AUTO_QUEUES):
        assert found[f"grit_oldest_wait_seconds[('queue', '{queue}')]"] == 0
        for status in JobStatus:
            assert found[f"grit_jobs[('queue', '{queue}'), ('status', '{status}')]"] == 0
    workers = [name for name in found if name.startswith("grit_live_workers")]
    assert len(workers) == len((*TRAINING_QUEUES, *INFERENCE_QUEUES))
    assert {found[name] for name in workers} == {0}
    # The broker of this app is not there: how many requests wait cannot be known.
    assert math.isnan(found["grit_inference_waiting[('device', 'cpu')]"])


def test_a_gauge_that_fell_to_0_is_0_in_the_next_look(team: Team) -> None:
    queued = "grit_jobs[('queue', 'auto:cuda,mps,cpu'), ('status', 'queued')]"
    job = team.job()["id"]
    assert measured(team.client)[queued] == 1
    team.post(f"/jobs/{job}/cancel")
    assert measured(team.client)[queued] == 0


def test_the_help_of_each_measure_says_how_to_add_replicas_up(client: TestClient) -> None:
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    own = {each.name for each in families if "sum over the replicas" in each.documentation}
    repeated = {each.name for each in families if "not the sum" in each.documentation}
    assert own == {"grit_http_requests", "grit_http_request_seconds"}
    assert repeated == {
        "grit_jobs",
        "grit_oldest_wait_seconds",
        "grit_live_workers",
        "grit_inference_waiting",
    }
    assert own | repeated == {each.name for each in families}


def test_readiness_tells_training_from_inference_by_queue(
    settings: Settings, valkey: str, queue_prefix: str
) -> None:
    update = {"broker_url": valkey, "queue_prefix": queue_prefix}
    with opened(settings.model_copy(update=update)) as app, TestClient(app) as client:
        services: Services = app.state.services
        team = new_team(client, "alpha")
        team.job()
        team.job(device="cpu")
        services.mailbox.submit("inf_1", device="cpu", team="alpha", payload={})
        with transaction(services.engine) as session:
            assert attempts.claim_next(session, queue="cpu", worker_id="w", lease_seconds=60)
        ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["checks"]["inference"] == "no live worker answers requests"
    found = {each["queue"]: each for each in ready.json()["queues"]}
    assert list(found) == [*TRAINING_QUEUES, *AUTO_QUEUES, *INFERENCE_QUEUES]
    cpu, auto, infer = found["cpu"], found["auto:cuda,mps,cpu"], found["infer.cpu"]
    assert (cpu["kind"], cpu["workers"], cpu["running"], cpu["waiting"]) == ("training", 1, 1, 1)
    assert cpu["oldest_wait_seconds"] >= 0
    # The one that waited in the strategy's queue was the older one, and runs on the CPU now.
    assert (auto["workers"], auto["waiting"], auto["oldest_wait_seconds"]) == (1, 0, None)
    assert (infer["kind"], infer["workers"], infer["waiting"]) == ("inference", 0, 1)
    assert found["cuda"] == {
        "queue": "cuda",
        "kind": "training",
        "workers": 0,
        "running": 0,
        "waiting": 0,
        "oldest_wait_seconds": None,
    }


def test_a_worker_that_takes_no_work_is_measured_as_readiness_counts_it(
    client: TestClient, services: Services
) -> None:
    with transaction(services.engine) as session:
        session.execute(update(Worker).values(stopping=True))  # as in quarantine
    ready = client.get("/readyz").json()
    assert {each["workers"] for each in ready["queues"]} == {0}
    lines = client.get("/metrics").text.splitlines()
    measured = {line.split()[-1] for line in lines if line.startswith("grit_live_workers{")}
    assert measured == {"0.0"}


def test_a_deployment_for_inference_only_is_ready_and_says_that_nothing_trains(
    client: TestClient, services: Services
) -> None:
    with transaction(services.engine) as session:
        session.execute(delete(Worker))
        register_worker(
            session, hostname="here", process_id=1, queues=["infer.cuda"], device="cuda"
        )
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert ready.json()["checks"]["training"] == "no live worker trains: jobs wait"
    assert ready.json()["checks"]["inference"] == "ok"


def test_the_version_names_the_schema(client: TestClient) -> None:
    found = client.get("/version").json()
    assert found["name"] == "grit-service"
    assert found["schema_revision"]


@pytest.mark.parametrize("path", ["/healthz", "/nothing", "/jobs"])
def test_every_answer_has_a_request_id_and_safe_headers(client: TestClient, path: str) -> None:
    answer = client.get(path, headers={"X-Request-Id": "caller-given-id"})
    assert answer.headers["X-Request-Id"] == "caller-given-id"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in answer.headers
    odd = client.get(path, headers={"X-Request-Id": "a b\tc"})
    assert odd.headers["X-Request-Id"].startswith("req_")


def test_a_log_line_is_json_and_holds_neither_keys_nor_bodies(
    team: Team, capfd: pytest.CaptureFixture[str]
) -> None:
    team.get("/jobs?metadata[secret]=canary-query")
    team.post("/jobs", json={"model": "canary-body"}, headers={"X-Request-Id": "line-of-mine"})
    lines = capfd.readouterr().err.splitlines()
    mine = [json.loads(line) for line in lines if "line-of-mine" in line]
    assert mine[0]["path"] == "/jobs"
    assert mine[0]["status"] == 422
    text = "\n".join(lines)
    for canary in (team.token, "canary-query", "canary-body"):
        assert canary not in text


def test_a_failure_of_ours_is_logged_and_tells_nothing(
    team: Team, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("an inner detail")

    monkeypatch.setattr("store.jobs.list_jobs", break_down)
    answer = team.get("/jobs")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "inner detail" not in answer.text
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_the_embedded_key_is_written_once_and_for_its_owner_alone(
    settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "home" / "key"
    embedded = settings.model_copy(update={"key_file": path})
    with TestClient(create_app(embedded)) as client:
        token = path.read_text().strip()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        answer = client.get("/keys", headers={"Authorization": f"Bearer {token}"})
        assert [key["team"] for key in answer.json()["data"]] == ["default"]
    with TestClient(create_app(embedded)) as client:
        assert path.read_text().strip() == token
        assert client.get("/jobs", headers={"Authorization": f"Bearer {token}"}).status_code == 200


def test_a_key_tells_when_it_was_last_used(join: Callable[..., Team]) -> None:
    admin = join("alpha", Scope.ADMIN)
    admin.get("/keys")
    key = next(k for k in admin.get("/keys").json()["data"] if k["team"] == "alpha")
    assert key["last_used_at"] is not None


def test_an_administrator_makes_and_revokes_keys(join: Callable[..., Team]) -> None:
    admin = join("ops", Scope.ADMIN)
    body = {"name": "ci", "team": "beta", "scopes": ["read"]}
    made = admin.post("/keys", json=body)
    assert made.status_code == 201
    key = made.json()
    reader = Team(admin.client, "beta", key["key"])
    assert reader.get("/jobs").status_code == 200
    assert reader.get("/keys").status_code == 403
    assert key["key"] not in admin.get("/keys").text
    assert admin.delete(f"/keys/{key['id']}").status_code == 204
    assert reader.get("/jobs").status_code == 401
    assert admin.delete("/keys/key_unknown").status_code == 404


@pytest.mark.parametrize(
    "fields",
    [
        {"scopes": []},
        {"scopes": ["root"]},
        {"team": "No Such"},
        {"expires_at": "2027-01-01T00:00:00"},
        {"name": ""},
    ],
    ids=str,
)
def test_a_bad_key_is_refused(join: Callable[..., Team], fields: dict[str, object]) -> None:
    admin = join("ops", Scope.ADMIN)
    answer = admin.post("/keys", json={"name": "ci", "scopes": ["read"], **fields})
    assert answer.status_code == 422


def test_presets_devices_and_the_schema_are_listed(team: Team) -> None:
    names = [preset["name"] for preset in team.get("/presets").json()["data"]]
    assert names[:2] == ["smolvlm_fast", "smolvlm_256m"]
    assert team.get("/presets/smolvlm_fast").json()["config"]["text"]["n_layers"] == 4
    devices = team.get("/devices").json()
    assert [device["name"] for device in devices["data"]] == ["cpu"]
    chosen = {each["name"]: each["device"] for each in devices["strategies"]}
    assert chosen["auto_performance"] == "cpu"
    schema = team.get("/schema/job").json()
    assert schema["properties"]["eval_fraction"]["maximum"] == 0.5
    assert schema["additionalProperties"] is False


def test_models_are_listed_registered_and_show_their_layers(team: Team, tmp_path: Path) -> None:
    listed = team.get("/models").json()
    assert [model["status"] for model in listed["data"]] == ["ready"]
    answer = team.get("/models/tests/tiny-smolvlm/layers").json()
    assert (answer["unsupported"], answer["bypassed"]) == ({"Conv2d": 1}, {})
    layers = answer["modalities"]
    assert {name: len(rows) for name, rows in layers.items()} == {
        "vision": 12,
        "text": 18,
        "cross_modal": 1,
    }
    folder = tmp_path / "models" / "own"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    made = team.post("/models", json={"id": "own", "source": str(folder)})
    assert made.status_code == 202, made.text
    assert made.headers["Location"] == "/models/own"
    assert team.get("/models/own").json()["status"] == "registering"
    assert team.get("/models/own/layers").status_code == 409
    other = team.post("/models", json={"id": "own", "source": "allowed/other"})
    assert (other.status_code, other.json()["code"]) == (409, "model_conflict")
    gone = team.post("/models", json={"id": "x", "source": f"{folder}-gone"})
    assert gone.json()["errors"][0]["pointer"] == "/source"


@pytest.mark.slow
@pytest.mark.usefixtures("sqlite_url")
def test_the_service_answers_soon_after_its_start(tmp_path: Path) -> None:
    port = reserve_port()
    command = [sys.executable, "-m", "api", "--port", str(port)]
    environment = {"GRIT_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", **run_mark()}
    with subprocess.Popen(command, env=environment) as process:
        try:
            deadline = time.monotonic() + 30
            status = 0
            while status != 200 and time.monotonic() < deadline:
                time.sleep(0.02)
                try:
                    status = httpx.get(f"http://127.0.0.1:{port}/healthz").status_code
                except httpx.TransportError:
                    continue
            assert status == 200
        finally:
            process.terminate()
            process.wait(timeout=20)


@pytest.mark.slow
@pytest.mark.usefixtures("sqlite_url")
def test_answers_on_an_inherited_socket_do_not_wait_for_acknowledgements(tmp_path: Path) -> None:
    """Head and body are two writes; with Nagle's algorithm on the second waits 40 ms."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        number = listener.fileno()
        command = [sys.executable, "-m", "api", "--fd", str(number)]
        environment = {"GRIT_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", **run_mark()}
        with subprocess.Popen(command, env=environment, pass_fds=[number]) as process:
            try:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}/healthz"
                with httpx.Client(timeout=30) as client:
                    taken = []
                    for _ in range(100):
                        started = time.perf_counter()
                        client.get(url).raise_for_status()
                        taken.append(time.perf_counter() - started)
                # Later ones would all wait; a busy machine delays many, and not every tenth.
                assert sorted(taken[40:])[6] < 0.035
            finally:
                process.terminate()
                process.wait(timeout=20)
